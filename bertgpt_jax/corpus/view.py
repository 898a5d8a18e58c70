"""What a model input is made from: the interface of a tokenised corpus, and one that lives in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from bertgpt_jax.corpus.special import TRAINED_IDS, SpecialIds
from bertgpt_jax.errors import DataError

WORD_START = np.uint8(1)
"""Flag of a token that begins a word."""
SENTENCE_START = np.uint8(2)
"""Flag of a token that begins a sentence."""

SPLITS = ("train", "held_out")


class Corpus:
    """Documents as token ids in shards, addressed by one global token coordinate.

    In a shard the documents of `train` come first, then those of `held_out`; every document is followed by one
    terminator token (`special.eot`, flags 0), so document i+1 starts at the end of document i plus one.

    Attributes:
        vocab_size, special: of the tokenizer.
        fingerprint: sha256 (hex) of the content, splits and tokenizer.
        documents, train_documents, tokens, train_tokens: int64[S], one row a shard; tokens count terminators.
        token_base: int64[S+1], the global coordinate of each shard's first token.
    """

    vocab_size: int
    special: SpecialIds
    fingerprint: str
    documents: np.ndarray
    train_documents: np.ndarray
    tokens: np.ndarray
    train_tokens: np.ndarray
    token_base: np.ndarray

    @property
    def num_shards(self) -> int:
        return len(self.documents)

    def split_documents(self, split: str) -> list[tuple[int, int, int]]:
        """`(shard, lo, hi)` for each shard that has documents lo..hi of the split."""
        _check_split(split)
        if split == "train":
            return _nonempty(np.zeros_like(self.documents), self.train_documents)
        return _nonempty(self.train_documents, self.documents)

    def split_tokens(self, split: str) -> list[tuple[int, int, int]]:
        """`(shard, start, stop)` in global coordinates: each shard's tokens of the split, terminators included."""
        _check_split(split)
        middle = self.token_base[:-1] + self.train_tokens
        if split == "train":
            return _nonempty(self.token_base[:-1], middle)
        return _nonempty(middle, self.token_base[1:])

    def special_mask(self) -> np.ndarray:
        """bool[vocab_size]: ids that are never masked and never drawn as a random replacement."""
        mask = np.zeros(self.vocab_size, bool)
        mask[list(self.special.ids())] = True
        return mask

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The tokens of spans `[starts_k, starts_k + lengths_k)` (global, int64) one after another, int32 flat."""
        raise NotImplementedError

    def gather_flags(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The flags of the same spans, uint8 flat."""
        raise NotImplementedError

    def document_spans(self, shard: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        """Global start and end (exclusive, without the terminator) of documents lo..hi of a shard, int64 each."""
        raise NotImplementedError

    def document_bytes(self, shard: int, lo: int, hi: int) -> np.ndarray:
        """UTF-8 bytes of the text of documents lo..hi of a shard, int64."""
        raise NotImplementedError

    def document_origin(self, shard: int, index: int) -> tuple[str, int]:
        """Source name of a document, and where it starts there: its byte (uncompressed), row, example or topic."""
        raise NotImplementedError

    def split_bytes(self, split: str) -> int:
        """UTF-8 bytes of text of a split, for bits per byte."""
        return sum(int(self.document_bytes(*row).sum()) for row in self.split_documents(split))


def _nonempty(lo: np.ndarray, hi: np.ndarray) -> list[tuple[int, int, int]]:
    """`(shard, lo, hi)` of the shards in which the range is not empty; there may be 100,000 of them."""
    shards = np.flatnonzero(hi > lo)
    return list(zip(shards.tolist(), lo[shards].tolist(), hi[shards].tolist(), strict=True))


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise DataError(f"unknown split '{split}'; a corpus has {' and '.join(SPLITS)}")


def ragged_index(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 flat: `starts_k, starts_k + 1, ..., starts_k + lengths_k - 1` for every k, one after another."""
    lengths = np.asarray(lengths, np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    offsets = np.asarray(starts, np.int64) - (ends - lengths)
    return np.repeat(offsets, lengths) + np.arange(total, dtype=np.int64)


def shard_bases(tokens: np.ndarray) -> np.ndarray:
    """int64[S+1]: cumulative token counts with a leading 0."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(tokens, dtype=np.int64)])


class InMemoryCorpus(Corpus):
    """A corpus made of lists, with the interface of one on disk.

    Args:
        documents: the train documents; a document is a list of sentences, a sentence a list of ids.
        vocab_size, special: as a tokenizer would give them.
        held_out: the held-out documents.
        shards: train and held-out documents are dealt to this many shards in equal runs.
        word_starts: for each document of `documents` then `held_out`, a flag for each token; every token by default.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[Sequence[int]]],
        vocab_size: int,
        special: SpecialIds = TRAINED_IDS,
        held_out: Sequence[Sequence[Sequence[int]]] = (),
        shards: int = 1,
        word_starts: Sequence[Sequence[bool]] | None = None,
    ):
        self.vocab_size, self.special = vocab_size, special
        train_parts = np.array_split(np.arange(len(documents)), shards)
        held_parts = np.array_split(np.arange(len(documents), len(documents) + len(held_out)), shards)
        everything = [*documents, *held_out]
        tokens, flags, ends, bases, self._order = [], [], [], [0], []
        rows = []
        for train, held in zip(train_parts, held_parts, strict=True):
            shard_ends, position, train_tokens = [], 0, 0
            for count, number in enumerate([*train, *held], start=1):
                ids, bits = _flat_document(everything[number], word_starts[number] if word_starts else None)
                if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
                    raise DataError(f"document {number} has ids outside 0..{vocab_size - 1}")
                tokens += [*ids, special.eot or 0]
                flags += [*bits, 0]
                shard_ends.append(position + len(ids))
                position += len(ids) + 1
                if count == len(train):
                    train_tokens = position
            rows.append((len(train) + len(held), len(train), position, train_tokens))
            ends.append(np.array(shard_ends, np.int64))
            bases.append(bases[-1] + position)
            self._order.append([int(n) for n in [*train, *held]])
        columns = np.array(rows, np.int64).reshape(-1, 4).T
        self.documents, self.train_documents, self.tokens, self.train_tokens = columns
        self.token_base = np.array(bases, np.int64)
        self._tokens, self._flags, self._ends = np.array(tokens, np.int32), np.array(flags, np.uint8), ends
        digest = hashlib.sha256(repr((vocab_size, special, rows)).encode())
        digest.update(self._tokens.tobytes() + self._flags.tobytes())
        self.fingerprint = digest.hexdigest()

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self._tokens[ragged_index(starts, lengths)]

    def gather_flags(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self._flags[ragged_index(starts, lengths)]

    def document_spans(self, shard: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        ends = self._ends[shard] + self.token_base[shard]
        starts = np.concatenate([self.token_base[shard : shard + 1], ends[:-1] + 1])
        return starts[lo:hi], ends[lo:hi]

    def document_bytes(self, shard: int, lo: int, hi: int) -> np.ndarray:
        """Four bytes a token: these documents never had a text."""
        starts, ends = self.document_spans(shard, lo, hi)
        return 4 * (ends - starts)

    def document_origin(self, shard: int, index: int) -> tuple[str, int]:
        return "memory", self._order[shard][index]


def _flat_document(
    sentences: Sequence[Sequence[int]], word_starts: Sequence[bool] | None
) -> tuple[list[int], list[int]]:
    """Ids and flags of a document given as sentences."""
    ids = [int(i) for sentence in sentences for i in sentence]
    bits = [int(WORD_START) * int(b) for b in (word_starts if word_starts is not None else [True] * len(ids))]
    position = 0
    for sentence in sentences:
        if len(sentence):
            bits[position] |= int(SENTENCE_START)
        position += len(sentence)
    return ids, bits
