"""Several documents or sentence pairs in one row, with random access: which segments row r of epoch e is made of.

A window of documents is cut into segments (pieces of a document, or pairs) that fit a row, and rows are filled with
them from their lengths alone: the longest first, each into the fullest row that still has room for it. That is
first-fit decreasing with the rows kept in order of what is left; a window loses about the end of its last row.
Attention stays inside a segment (Krell et al. 2021, "Efficient sequence packing without cross-contamination").
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from bertgpt_jax.batches.index import PLANS_KEPT, RowIndex, document_windows
from bertgpt_jax.batches.pairs import SentencePairs, no_pairs, plan_pairs, read_sentences
from bertgpt_jax.batches.sentences import cut_sentences
from bertgpt_jax.config import ADDED, Config
from bertgpt_jax.corpus.view import Corpus, ragged_index


class PackedDocuments(Config):
    """Whole documents, several in a row; one longer than a row is cut, and its last piece packed like a document.

    Masked: a segment is [CLS] + piece + [SEP] (`cut="sentences"` gives RoBERTa's DOC-SENTENCES without its padding).
    Causal: a segment reads the end-of-document token, or the token before its piece, and predicts the piece; the last
    piece ends by predicting the end of the document. So every token is a target once an epoch and nothing is predicted
    from another document. Empty documents are left out; an epoch's rows are those of every other, in another order.
    """

    kind: Literal["packed_documents"] = "packed_documents"
    cut: Literal["tokens", "sentences"] = "tokens"
    """Where a document longer than a row is cut: at the row's end, or before the sentence that no longer fits."""
    max_segments: Annotated[int | None, ADDED] = Field(None, ge=1)
    """Pieces of a row, at most. cuDNN keeps 4 bytes a token and head for each, so it packs rows only with a limit."""


class PackedPairs(SentencePairs):
    """Sentence pairs, several in a row, each with its own [CLS], types and label."""

    kind: Literal["packed_pairs"] = "packed_pairs"
    max_segments: int = Field(16, ge=1, le=512)
    """Pairs of a row, at most: the width K of the arrays of labels."""


@dataclasses.dataclass(frozen=True)
class PackedPlan:
    """The rows of a window. A segment reads k spans: a piece of a document, or A and B of a pair.

    Attributes:
        base: global coordinate that starts count from.
        first: int64[R+1], the first segment of each row.
        start, length: int32[S, k], the stored tokens of each segment.
        label: bool[S], of a piece: it begins its document; of a pair: B is random.
        tally: slots of the rows that hold a token.
    """

    base: int
    first: np.ndarray
    start: np.ndarray
    length: np.ndarray
    label: np.ndarray
    tally: int

    def __len__(self) -> int:
        return len(self.first) - 1


# ---------------------------------------------------------------- filling rows


def fill_rows(cost: np.ndarray, capacity: int, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Deals segments to rows: the longest first, each to the fullest row that has room for it.

    Args:
        cost: int64[S], slots of each segment, in 1..capacity.
        most: segments of a row, at most.

    Returns:
        `order` int64[S] and `first` int64[R+1]: row r holds the segments order[first[r]:first[r+1]].
    """
    queue = np.argsort(-cost, kind="stable")
    row = np.empty(len(cost), np.int64)
    smallest, scale = int(cost.min(initial=capacity)), len(cost) + 1
    least = smallest if most is None or most > 1 else capacity + 1
    rows, alone = 0, int(np.searchsorted(-cost[queue], least - capacity, "left"))
    # what leaves no room even for the smallest stands alone, and needs no search
    row[queue[:alone]] = np.arange(alone)
    rows = alone
    held = [1] * alone
    open_rows: list[int] = []  # room * scale + row, ascending
    for segment, size in zip(queue[alone:].tolist(), cost[queue[alone:]].tolist(), strict=True):
        at = bisect.bisect_left(open_rows, size * scale)
        if at < len(open_rows):
            room, r = divmod(open_rows.pop(at), scale)
        else:
            room, r = capacity, rows
            rows += 1
            held.append(0)
        row[segment] = r
        held[r] += 1
        if room - size >= smallest and held[r] != most:
            bisect.insort(open_rows, (room - size) * scale + r)
    order = np.argsort(row, kind="stable")
    return order, np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(row, minlength=rows))])


def _packed(
    base: int, start: np.ndarray, length: np.ndarray, label: np.ndarray, extra: int, capacity: int, most: int | None
) -> PackedPlan:
    """The plan of segments of sum(length) + extra slots."""
    cost = length.sum(1) + extra
    order, first = fill_rows(cost, capacity, most)
    start, length = start[order].astype(np.int32), length[order].astype(np.int32)
    return PackedPlan(base, first, start, length, label[order], int(cost.sum()))


# ---------------------------------------------------------------- what a window's segments are


def document_pieces(
    corpus: Corpus, window: np.ndarray, cut: str, capacity: int, terminators: bool
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """The documents of a window in pieces of at most `capacity` tokens.

    Args:
        window: (shard, lo, hi).
        terminators: the end-of-document token belongs to the last piece.

    Returns:
        base, start and length int64[S] of each piece counted from it, and whether it begins its document, bool[S].
    """
    shard, lo, hi = map(int, window)
    if cut == "sentences":
        sentences = read_sentences(corpus, shard, lo, hi)
        start, stop = sentences.start, sentences.start + sentences.length
        stop[sentences.first[1:] - 1] += terminators
        start, stop, document = cut_sentences(start, stop, sentences.document, capacity)
        return sentences.base, start, stop - start, np.diff(document, prepend=-1) != 0
    starts, ends = corpus.document_spans(shard, lo, hi)
    base, kept = int(starts[0]), ends > starts
    starts, total = starts[kept] - base, (ends - starts)[kept] + terminators
    pieces = -(-total // capacity)
    piece = ragged_index(np.zeros_like(pieces), pieces)
    start = np.repeat(starts, pieces) + capacity * piece
    length = np.minimum(np.repeat(total, pieces) - capacity * piece, capacity)
    return base, start, length, piece == 0


def plan_documents(
    corpus: Corpus, config: PackedDocuments, window: np.ndarray, sequence_length: int, causal: bool
) -> PackedPlan:
    """The rows of a window's documents."""
    extra = 0 if causal else 2
    base, start, length, begins = document_pieces(corpus, window, config.cut, sequence_length - extra, causal)
    return _packed(base, start[:, None], length[:, None], begins, extra, sequence_length, config.max_segments)


def plan_packed_pairs(
    corpus: Corpus, config: PackedPairs, window: np.ndarray, sequence_length: int, seed: int, epoch: int
) -> PackedPlan:
    """The rows of a window's sentence pairs in one epoch."""
    pairs = plan_pairs(config, read_sentences(corpus, *map(int, window)), sequence_length, seed, epoch)
    length = pairs.length.astype(np.int64)
    return _packed(pairs.base, pairs.start, length, pairs.random, 3, sequence_length, config.max_segments)


# ---------------------------------------------------------------- random access


@dataclasses.dataclass(frozen=True)
class Segments:
    """The segments of some rows, row by row.

    Attributes:
        rows: number of rows R.
        row: int64[S], ascending, which of the rows; `number`: int64[S], 1, 2, ... in each row.
        start, length: int64[S, k], global spans of stored tokens.
        label: bool[S], as in `PackedPlan`.
    """

    rows: int
    row: np.ndarray
    number: np.ndarray
    start: np.ndarray
    length: np.ndarray
    label: np.ndarray


class PackedRows:
    """Rows of planned segments.

    Args:
        windows: int64[W, 3], as from `document_windows`.
        plan: (epoch, window number) to its rows; pure.
        spans: k, the spans of a segment.
        same_every_epoch: the plans do not depend on the epoch.
        name: identifies corpus, settings and seed, for the cache of row counts in `cache_dir`.
    """

    def __init__(
        self,
        windows: np.ndarray,
        plan: Callable[[int, int], PackedPlan],
        spans: int,
        same_every_epoch: bool,
        seed: int,
        name: str,
        cache_dir: Path | None,
        plans_kept: int = PLANS_KEPT,
    ):
        self.same_every_epoch, self._spans = same_every_epoch, spans
        self._index = RowIndex(len(windows), plan, seed, name, cache_dir, plans_kept, same_every_epoch)
        self.count, self.order, self.filled = self._index.count, self._index.order, self._index.tally

    def segments(self, epoch: int, rows: np.ndarray) -> Segments:
        """What the rows are made of."""
        window, local = self._index.locate(epoch, rows)
        plans = {w: self._index.plan(epoch, w) for w in np.unique(window).tolist()}
        here = {w: np.flatnonzero(window == w) for w in plans}
        counts = np.zeros(len(rows), np.int64)
        for w, plan in plans.items():
            counts[here[w]] = np.diff(plan.first)[local[here[w]]]
        begin, total = np.cumsum(counts) - counts, int(counts.sum())
        start, length = np.empty((2, total, self._spans), np.int64)
        label = np.empty(total, bool)
        for w, plan in plans.items():
            chosen = ragged_index(plan.first[local[here[w]]], counts[here[w]])
            place = ragged_index(begin[here[w]], counts[here[w]])
            start[place], length[place] = plan.base + plan.start[chosen].astype(np.int64), plan.length[chosen]
            label[place] = plan.label[chosen]
        row = np.repeat(np.arange(len(rows)), counts)
        return Segments(len(rows), row, np.arange(total) - begin[row] + 1, start, length, label)

    def spans(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Global start and length of the tokens of each row, int64[R, K]; rows of fewer spans end with empty ones."""
        found = self.segments(epoch, rows)
        k = self._spans
        start, length = np.zeros((2, len(rows), k * int(found.number.max(initial=1))), np.int64)
        column = k * (found.number - 1)[:, None] + np.arange(k)
        start[found.row[:, None], column], length[found.row[:, None], column] = found.start, found.length
        return start, length


def packed_documents(
    corpus: Corpus,
    config: PackedDocuments,
    split: str,
    sequence_length: int,
    causal: bool,
    seed: int,
    name: str,
    cache_dir: Path | None,
) -> PackedRows:
    """The packed rows of a split's documents; `name` as in `PackedRows`."""
    windows = document_windows(corpus, split)

    def plan(epoch: int, window: int) -> PackedPlan:
        return plan_documents(corpus, config, windows[window], sequence_length, causal)

    return PackedRows(windows, plan, 1, True, seed, name, cache_dir)


def packed_pairs(
    corpus: Corpus, config: PackedPairs, split: str, sequence_length: int, seed: int, name: str, cache_dir: Path | None
) -> PackedRows:
    """The packed rows of a split's sentence pairs; DataError if no document has two sentences."""
    windows = document_windows(corpus, split)

    def plan(epoch: int, window: int) -> PackedPlan:
        return plan_packed_pairs(corpus, config, windows[window], sequence_length, seed, epoch)

    if not any((np.diff(read_sentences(corpus, *map(int, window)).first) > 1).any() for window in windows):
        raise no_pairs(windows, split, "packed_documents")
    return PackedRows(windows, plan, 2, False, seed, name, cache_dir)
