"""BERT's sentence pairs, with random access: which sentences make A and B of row r of epoch e.

The algorithm is `create_instances_from_document` of google-research/bert `create_pretraining_data.py`, over lengths
only: sentences are gathered into a chunk up to the document's target length, cut into A and B, and in half of the
chunks B is replaced by sentences of another document; the sentences it replaces are put back and begin the next chunk.

More than half of all pairs are random (54-61%, by the length of the documents): a chunk of one sentence has nothing to
follow it and always gets a random B. Such a chunk is a sentence as long as the target, or the last of its document, and
putting back makes last ones more frequent: behind a random B the rest of the chunk starts anew, down to one sentence.
`pair_counts.py` counts both kinds; the rate is (alone + random_fraction * (pairs - alone)) / pairs.

What differs from the original: random documents come from the same window (another document, if the window has two),
and the draws of a chunk belong to the sentence it starts with. So a chunk is a function of its first sentence, all are
computed at once, and a document's rows are the chain that begins at its first sentence.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from bertgpt_jax.batches import bits
from bertgpt_jax.batches.index import PLANS_KEPT, RowIndex, document_windows
from bertgpt_jax.batches.windows import positions
from bertgpt_jax.config import ADDED, Config
from bertgpt_jax.corpus.view import SENTENCE_START, WORD_START, Corpus
from bertgpt_jax.errors import DataError

MIN_LENGTH = 16


class SentencePairs(Config):
    """[CLS] A [SEP] B [SEP] with B the next sentences or random ones (Devlin et al. 2019, appendix A.2), or A and B in
    either order (Lan et al. 2020, section 3.1). Rows without such a task are `full_documents` and its relatives, with
    the objective `masked_lm`."""

    kind: Literal["sentence_pairs"] = "sentence_pairs"
    task: Annotated[Literal["next_sentence", "sentence_order"], ADDED] = "next_sentence"
    """What the label 1 says: B is random; or A and B, which follow one another in the text, are swapped."""
    short_fraction: float = Field(0.1, ge=0, le=1)
    """Share of documents, drawn anew every epoch, whose target length is uniform in 2..T-3 instead of T-3."""
    random_fraction: float = Field(0.5, ge=0, le=1)
    """Share of the chunks of two sentences or more whose B is random, or which are swapped."""


@dataclasses.dataclass(frozen=True)
class Sentences:
    """The sentences of a window's documents, empty documents left out.

    Attributes:
        base: global coordinate that `start` counts from.
        start: int64[S], first token of each sentence; `length`: int64[S] its tokens.
        document: int64[S], which of the D documents it is of.
        first: int64[D+1], the first sentence of each document.
        number: int64[D], the document's identity: shard * 2^32 + index in the shard.
    """

    base: int
    start: np.ndarray
    length: np.ndarray
    document: np.ndarray
    first: np.ndarray
    number: np.ndarray


@dataclasses.dataclass(frozen=True)
class PairPlan:
    """The pairs of a window, in the order of its documents, after truncation.

    Attributes:
        base: global coordinate that starts count from.
        start, length: int32[R, 2], tokens of A and of B.
        random: bool[R], the label: B is random, or A and B are swapped.
        tally: documents with two sentences or more.
        alone: pairs whose chunk had one sentence; they have a random B whatever the draw.
    """

    base: int
    start: np.ndarray
    length: np.ndarray
    random: np.ndarray
    tally: int
    alone: int

    def __len__(self) -> int:
        return len(self.random)


def read_sentences(corpus: Corpus, shard: int, lo: int, hi: int) -> Sentences:
    """Sentences of documents lo..hi of a shard, from the flags; a document without flags is one sentence."""
    starts, ends = corpus.document_spans(shard, lo, hi)
    kept = np.flatnonzero(ends > starts)
    number = (np.int64(shard) << 32) + lo + kept
    base = int(starts[0])
    starts, ends = starts[kept] - base, ends[kept] - base
    total = int(ends[-1]) if len(ends) else 0
    begins = (corpus.gather_flags(np.array([base]), np.array([total])) & SENTENCE_START) != 0
    begins[starts] = True
    start = np.flatnonzero(begins)
    first = np.searchsorted(start, np.append(starts, total))
    document = np.repeat(np.arange(len(starts)), np.diff(first))
    # the last sentence of a document ends before its terminator
    stop = np.minimum(np.append(start[1:], total), ends[document])
    return Sentences(base, start, stop - start, document, first, number)


def plan_pairs(config: SentencePairs, sentences: Sentences, sequence_length: int, seed: int, epoch: int) -> PairPlan:
    """The pairs of one window in one epoch."""
    room = sequence_length - 3
    first, document, number = sentences.first, sentences.document, sentences.number
    draw = bits.words(bits.stream(seed, "pair-target", epoch), number, 2)
    target = np.where(bits.happens(draw[:, 0], config.short_fraction), 2 + bits.below(draw[:, 1], room - 1), room)

    # every sentence as the first of a chunk: where the chunk stops, where A stops, whether the label is 1
    here = np.arange(len(document))
    draw = bits.words(bits.stream(seed, "pair", epoch), number[document], 4, sub=here - first[document])
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(sentences.length)])
    last = first[document + 1]
    stop = np.minimum(np.searchsorted(before, before[:-1] + target[document]), last)
    if config.task == "sentence_order":
        stop = _with_company(here, stop, last)
    a_stop = here + 1 + bits.below(draw[:, 0], np.maximum(stop - here - 1, 1))
    label = bits.happens(draw[:, 1], config.random_fraction)
    if config.task == "sentence_order":
        chunk = chain(stop)
        chunk = chunk[stop[chunk] - chunk > 1]
        spans = np.stack([chunk, a_stop[chunk]], axis=1), np.stack([a_stop[chunk], stop[chunk]], axis=1)
        begin, end = (np.where(label[chunk, None], x[:, ::-1], x) for x in spans)
        alone = 0
    else:
        label |= stop - here == 1
        chunk = chain(np.where(label, a_stop, stop))
        begin, end = _next_or_random(sentences, before, target, chunk, a_stop[chunk], stop[chunk], label[chunk], draw)
        alone = int((stop[chunk] - chunk == 1).sum())
    start, length = sentences.start[begin], before[end] - before[begin]
    document = document[chunk]
    start, length = _truncate(start, length, room, number[document], chunk - first[document], seed, epoch)
    tally = int((np.diff(first) > 1).sum())
    return PairPlan(sentences.base, start.astype(np.int32), length.astype(np.int32), label[chunk], tally, alone)


def _next_or_random(
    sentences: Sentences,
    before: np.ndarray,
    target: np.ndarray,
    chunk: np.ndarray,
    a_stop: np.ndarray,
    stop: np.ndarray,
    random: np.ndarray,
    draw: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The first sentence, and the one behind the last, of A and B: int64[R, 2] both.

    Args:
        before: int64[S+1], tokens of the window before each sentence; target: int64[D], of each document.
        chunk, a_stop, stop: int64[R], the first sentence of each chunk, and those behind A and behind the chunk.
        draw: uint32[S, 4], of the chunk that begins with each sentence.
    """
    first, document, draw = sentences.first, sentences.document[chunk], draw[chunk]
    a_length = before[a_stop] - before[chunk]
    other = bits.below(draw[:, 2], max(len(first) - 2, 1))
    other += (other >= document) & (len(first) > 2)
    begin = first[other] + bits.below(draw[:, 3], np.diff(first)[other])
    reach = np.searchsorted(before, before[begin] + target[document] - a_length)
    b_start = np.where(random, begin, a_stop)
    b_stop = np.where(random, np.clip(reach, begin + 1, first[other + 1]), stop)
    return np.stack([chunk, b_start], axis=1), np.stack([a_stop, b_stop], axis=1)


def _with_company(here: np.ndarray, stop: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Where chunks stop that have two sentences at least and leave none alone at the end of the document.

    Megatron-LM `helpers.cpp` (build_mapping) gathers so; ALBERT's script gives a lone sentence a random B instead, with
    the label of a swapped pair.
    """
    stop = np.minimum(np.maximum(stop, here + 2), last)
    return np.where(last - stop == 1, last, stop)


def chain(following: np.ndarray) -> np.ndarray:
    """int64: 0, following[0], following[following[0]], ...; the chain of a document ends where the next one begins."""
    jump, chain, at = following.tolist(), [], 0
    while at < len(jump):
        chain.append(at)
        at = jump[at]
    return np.array(chain, np.int64)


def _truncate(
    start: np.ndarray, length: np.ndarray, room: int, number: np.ndarray, sentence: np.ndarray, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pops tokens from the longer of A and B (B if equal) until both fit, from the front or the back by a fair coin.

    Args:
        start, length: int64[R, 2], A and B.
    """
    excess = np.maximum(length.sum(1) - room, 0)
    lead = length[:, 0] - length[:, 1]
    alone = np.minimum(np.abs(lead), excess)
    rest = excess - alone
    cut = np.stack([np.where(lead > 0, alone, 0) + rest // 2, np.where(lead < 0, alone, 0) + (rest + 1) // 2], axis=1)
    key = [bits.stream(seed, "pair-truncation", side, epoch) for side in "ab"]
    front = np.stack([bits.coin_sums(key[i], number, cut[:, i], sub=sentence) for i in (0, 1)], axis=1)
    return start + front, length - cut


def no_pairs(windows: np.ndarray, split: str, instead: str) -> DataError:
    """The error of a split, its windows given, whose documents all have one sentence; `instead` takes such."""
    documents = int((windows[:, 2] - windows[:, 1]).sum())
    return DataError(
        f"sentence pairs need documents of two sentences or more; all {documents} documents of the {split} split have "
        f"one: prepare the corpus with corpus.sentences=split or line, or use {instead}"
    )


class PairRows:
    """The sentence pairs of a split.

    Args:
        name: identifies corpus, settings and seed, for the cache of row counts in `cache_dir`.
    """

    same_every_epoch = False

    def __init__(
        self,
        corpus: Corpus,
        config: SentencePairs,
        split: str,
        sequence_length: int,
        seed: int,
        name: str,
        cache_dir: Path | None,
        plans_kept: int = PLANS_KEPT,
    ):
        self._windows = document_windows(corpus, split)

        def plan(epoch: int, window: int) -> PairPlan:
            sentences = read_sentences(corpus, *map(int, self._windows[window]))
            return plan_pairs(config, sentences, sequence_length, seed, epoch)

        self._index = RowIndex(len(self._windows), plan, seed, name, cache_dir, plans_kept)
        self.order = self._index.order
        if len(self._windows) and not self._index.tally(0):
            raise no_pairs(self._windows, split, "full_documents")

    def count(self, epoch: int) -> int:
        """Rows of an epoch: they vary with its draws, by some percent where documents are few and long."""
        return self._index.count(epoch)

    def filled(self, epoch: int) -> int:
        """Slots of an epoch's rows that hold a token, special ones included; plans all its windows."""
        plans = (self._index.plan(epoch, window) for window in range(len(self._windows)))
        return sum(int(plan.length.sum(dtype=np.int64)) + 3 * len(plan) for plan in plans)

    def spans(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Global start and length of A and B of each row, int64[R, 2]."""
        start, length, _ = self.pairs(epoch, rows)
        return start, length

    def pairs(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start and length of A and B, int64[R, 2], and the label, bool[R]."""
        window, local = self._index.locate(epoch, rows)
        start, length = np.empty((len(rows), 2), np.int64), np.empty((len(rows), 2), np.int64)
        random = np.empty(len(rows), bool)
        for w in np.unique(window):
            plan, here = self._index.plan(epoch, int(w)), np.flatnonzero(window == w)
            chosen = local[here]
            start[here] = plan.base + plan.start[chosen].astype(np.int64)
            length[here], random[here] = plan.length[chosen], plan.random[chosen]
        return start, length, random


def pair_arrays(
    corpus: Corpus, starts: np.ndarray, lengths: np.ndarray, random: np.ndarray, sequence_length: int, words: bool
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The arrays of pairs before masking; and word starts bool[R, T] if `words`.

    Returns:
        `tokens`, `positions`, `segments` (1, padding 0), `types` (1 on B and its [SEP]) int32[R, T];
        `next_labels` int32[R] (1 = random or swapped), `next_weights` float32[R].
    """
    special, column = corpus.special, np.arange(sequence_length)
    a_end = lengths[:, :1] + 1
    end = a_end + lengths[:, 1:] + 1
    content = (column >= 1) & (column < end) & (column != a_end)
    flat = starts.reshape(-1), lengths.reshape(-1)
    tokens = np.full(content.shape, special.pad, np.int32)
    tokens[content] = corpus.gather(*flat)
    tokens[:, 0] = special.cls
    np.put_along_axis(tokens, np.concatenate([a_end, end], axis=1), special.sep, axis=1)
    word_start = None
    if words:
        word_start = np.zeros(content.shape, bool)
        word_start[content] = corpus.gather_flags(*flat) & WORD_START
    arrays = {
        "tokens": tokens,
        "positions": positions(*tokens.shape),
        "segments": (column <= end).astype(np.int32),
        "types": ((column > a_end) & (column <= end)).astype(np.int32),
        "next_labels": random.astype(np.int32),
        "next_weights": np.ones(len(tokens), np.float32),
    }
    return arrays, word_start
