"""batch(n): the arrays of any batch of a split, as a pure function of (config, corpus, seed, n)."""

from __future__ import annotations

import bisect
import functools
import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np

from bertgpt_jax.batches.checks import (
    check_ids,
    check_rows,
    check_settings,
    check_split,
    warn_of_lost_predictions,
)
from bertgpt_jax.batches.examples import FORMAT, Batch, ExampleMaker, Examples, Rows
from bertgpt_jax.batches.masking import Masking, mask_rows, mask_tables
from bertgpt_jax.batches.windows import positions
from bertgpt_jax.config import fingerprint, identity
from bertgpt_jax.corpus.view import Corpus
from bertgpt_jax.errors import DataError

EVALUATION_SEED = 20181011
"""Evaluation pairs and masks are the same for every run, whatever its seed."""
_DOCUMENTS_READ = 8192
"""Documents whose ends are read together: a chunk of their array."""


class Dataset:
    """Batches of a split of a corpus.

    Rows are numbered 0.. through all epochs in their shuffled order; batch n holds rows n*B to n*B+B-1, so every row of
    an epoch is used exactly once. Arrays of a batch (B rows of T tokens, P predictions; int32 unless said):

    * all: `tokens`, `positions` [B, T];
    * causal (`Windows`, `ContiguousStreams`, `PackedDocuments` without masking): `targets` [B, T], `weights` float32
      [B, T];
    * masked: `segments` [B, T] (1, padding 0), `mask_positions`, `mask_labels` [B, P], `mask_weights` float32 [B, P];
    * pairs: `types` [B, T] (0 A, 1 B), `next_labels` [B] (1 = random), `next_weights` float32 [B];
    * packed: `segments` 1, 2, ... in each row, `positions` from 0 in each segment; packed pairs have `next_labels`,
      `next_weights` and `cls_positions` of [B, K];
    * `ContiguousStreams`: `resets` [B], 1 where memory is cleared.

    Args:
        corpus: a tokenised corpus.
        examples, masking: what a row is; causal examples take no masking, the others need it.
        split: "train" or "held_out".
        sequence_length, batch_size: T and B.
        seed: of order, pairs and masks.
        cache_dir: where row counts of sentence pairs are kept between runs.
        debug: checks the ids of every batch.

    Raises:
        ConfigError: settings that contradict one another, or a tokenizer that lacks a special token.
        DataError: an empty split, or one of fewer rows than a batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        examples: Examples,
        masking: Masking | None,
        *,
        split: str = "train",
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        debug: bool = False,
    ):
        self.corpus, self.examples, self.masking, self.split = corpus, examples, masking, split
        self.sequence_length, self.batch_size, self.seed, self._debug = sequence_length, batch_size, seed, debug
        self._cache_dir = Path(cache_dir) if cache_dir else None
        check_settings(corpus, examples, masking, sequence_length, batch_size)
        check_split(corpus, split)
        self._maker = ExampleMaker(corpus, examples, split, sequence_length, batch_size, causal=masking is None)
        self._tables = None
        if masking is not None:
            self._tables = mask_tables(masking, corpus.special.mask, corpus.special_mask(), corpus.special.unk)
            if split == "train":
                warn_of_lost_predictions(masking, sequence_length)
        self._epoch_starts = [0]
        self._lock = threading.Lock()
        if split == "train":
            self._check_size()
        else:
            self.eval_rows()

    # ------------------------------------------------------------ sizes

    @property
    def tokens_per_batch(self) -> int:
        """B * T, padding counted."""
        return self.batch_size * self.sequence_length

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that batches depend on."""
        return self._name(self.seed)

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """Rows of an epoch; for sentence pairs it differs slightly between epochs, and is planned when asked for."""
        return self._rows.count(epoch)

    def packing_efficiency(self, epoch: int = 0) -> float:
        """Share of an epoch's B * T slots that hold a token, special ones included; the rest is padding."""
        filled = self._maker.filled(self._rows, epoch)
        return filled / (self.rows_per_epoch(epoch) * self.sequence_length)

    def epoch_of(self, n: int) -> float:
        """Epochs seen before batch n, in closed form from the first epoch's rows (pairs: nearly exact)."""
        return n * self.batch_size / self.rows_per_epoch(0)

    # ------------------------------------------------------------ training batches

    def batch(self, n: int, rows: np.ndarray | None = None) -> Batch:
        """The arrays of batch n.

        Args:
            n: non-negative.
            rows: which of the batch's rows to build, int [R] in [0, B), in the order wanted; all by default.
        """
        if n < 0:
            raise IndexError(f"batch {n}: batches are numbered from 0")
        return self.at(self.numbers(n * self.batch_size, self.batch_size, rows))

    def describe(self, n: int, rows: np.ndarray | None = None) -> list[dict[str, Any]]:
        """For each row of batch n: its `epoch`, its `example` number there, and the `documents` it is made of.

        A document is (shard, index in the shard, first token, end), tokens counted from the document's start; those of
        a pair's A come before those of B. A terminator belongs to the document before it.
        """
        return self.describe_at(self.numbers(n * self.batch_size, self.batch_size, rows))

    def numbers(self, first: int, size: int, rows: np.ndarray | None = None) -> np.ndarray:
        """int64[R]: the numbers, through all epochs, of rows (`rows` as in `batch`) of a batch of first..first+size-1.

        Batches of one size begin at multiples of it; a ramp of the batch size says where else.
        """
        return check_rows(rows, size) + first

    def at(self, numbers: np.ndarray) -> Batch:
        """The arrays of the rows of these numbers, in any order."""
        return self._build(self._rows, self.seed, *self._locate(numbers))

    def describe_at(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """`describe` of the rows of these numbers."""
        described = []
        for epoch, example in zip(*self._locate(numbers), strict=True):
            starts, lengths = self._rows.spans(int(epoch), np.array([example]))
            spans = zip(starts[0].tolist(), lengths[0].tolist(), strict=True)
            spans = [(start, start + length) for start, length in spans if length]
            documents = [d for start, stop in spans for d in documents_of(self.corpus, start, stop)]
            described.append({"epoch": int(epoch), "example": int(example), "documents": documents})
        return described

    def _locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, example of the epoch) of rows by number, int64[R] both."""
        epoch, rank = self._epochs(numbers)
        example = np.empty_like(rank)
        for e in np.unique(epoch):
            here = epoch == e
            example[here] = self._rows.order(int(e), rank[here])
        return epoch, example

    def _epochs(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, rank in it) of rows numbered through all epochs."""
        self._check_size()
        if self._rows.same_every_epoch:
            return np.divmod(numbers, self.rows_per_epoch(0))
        with self._lock:
            starts = self._epoch_starts
            while len(numbers) and starts[-1] <= numbers.max():
                starts.append(starts[-1] + self.rows_per_epoch(len(starts) - 1))
            edges = np.array(starts, np.int64)
        epoch = np.searchsorted(edges, numbers, "right") - 1
        return epoch, numbers - edges[epoch]

    def _check_size(self) -> None:
        rows = self.rows_per_epoch(0)
        if rows < self.batch_size:
            raise DataError(
                f"the {self.split} split makes {rows} rows of {self.sequence_length} tokens, fewer than one batch: "
                f"lower batch_size = {self.batch_size} or sequence_length, or bring more text"
            )

    # ------------------------------------------------------------ evaluation batches

    @functools.cached_property
    def _rows(self) -> Rows:
        return self._maker.rows(self.seed, False, self._cache_dir)

    @functools.cached_property
    def _eval_rows(self) -> Rows:
        return self._maker.rows(EVALUATION_SEED, True, self._cache_dir)

    def eval_rows(self) -> int:
        """Rows of an evaluation of the whole split; DataError if there are none."""
        rows = self._eval_rows.count(0)
        if not rows:
            raise DataError(f"the {self.split} split is too short for a single row; bring more text")
        return rows

    def eval_batches(self) -> int:
        """Batches of an evaluation of the whole split: every row once, in order, the last batch filled up."""
        return -(-self.eval_rows() // self.batch_size)

    def eval_batch(self, i: int, rows: np.ndarray | None = None) -> Batch:
        """Batch i of an evaluation, `rows` as in `batch`; rows beyond the split have weight 0 everywhere.

        Pairs and masks are frozen: the same whatever the run's seed and batch size.
        """
        if not 0 <= i < self.eval_batches():
            raise IndexError(f"evaluation batch {i} of {self.eval_batches()}")
        examples = check_rows(rows, self.batch_size) + i * self.batch_size
        exists = examples < self.eval_rows()
        built = self._build(self._eval_rows, EVALUATION_SEED, np.zeros_like(examples[exists]), examples[exists])
        if exists.all():
            return built
        padded = {name: np.zeros((len(exists), *value.shape[1:]), value.dtype) for name, value in built.items()}
        padded["tokens"][:] = self.corpus.special.pad or 0
        padded["positions"][:] = positions(1, self.sequence_length)
        for name, value in built.items():
            padded[name][exists] = value
        return padded

    def eval_fingerprint(self) -> str:
        """sha256 (hex) over all evaluation rows: what is seen, what is predicted, and with what weight."""
        digest = hashlib.sha256()
        step = max(1, (1 << 16) // self.sequence_length)
        for first in range(0, self.eval_rows(), step):
            examples = np.arange(first, min(first + step, self.eval_rows()))
            arrays = self._build(self._eval_rows, EVALUATION_SEED, np.zeros_like(examples), examples)
            rows = [arrays[name].view(np.uint8).reshape(len(examples), -1) for name in sorted(arrays)]
            digest.update(np.ascontiguousarray(np.concatenate(rows, axis=1)).data)
        return digest.hexdigest()

    # ------------------------------------------------------------ building

    def _name(self, seed: int) -> str:
        return fingerprint(
            {
                "format": FORMAT,
                "corpus": self.corpus.fingerprint,
                "examples": identity(self.examples),
                "masking": identity(self.masking) if self.masking else None,
                "split": self.split,
                "sequence_length": self.sequence_length,
                "batch_size": self.batch_size,
                "seed": seed,
            }
        )

    def _build(self, source: Rows, seed: int, epoch: np.ndarray, example: np.ndarray) -> Batch:
        """The arrays of examples; those of one epoch (a batch meets two at most, usually one) are built together."""
        epochs = np.unique(epoch)
        if len(epochs) <= 1:
            arrays = self._build_epoch(source, seed, int(epochs[0]) if len(epochs) else 0, example)
        else:
            arrays = {}
            for e in epochs:
                here = epoch == e
                for name, value in self._build_epoch(source, seed, int(e), example[here]).items():
                    whole = arrays.setdefault(name, np.empty((len(epoch), *value.shape[1:]), value.dtype))
                    whole[here] = value
        if self._debug:
            check_ids(arrays, self.corpus.vocab_size)
        return arrays

    def _build_epoch(self, source: Rows, seed: int, epoch: int, example: np.ndarray) -> Batch:
        words = self.masking is not None and self.masking.whole_word
        arrays, word_start = self._maker.arrays(source, epoch, example, words)
        if self.masking is None:
            return arrays
        real = arrays["segments"] > 0
        masks = mask_rows(self.masking, self._tables, seed, epoch, example, arrays["tokens"], real, word_start)
        return arrays | masks


def documents_of(corpus: Corpus, start: int, stop: int) -> list[tuple[int, int, int, int]]:
    """The documents that global tokens start..stop lie in: (shard, index in the shard, first token, end).

    The first one is searched for among the first documents of blocks, so that of a large shard little is read.
    """
    shard = int(np.searchsorted(corpus.token_base, start, "right")) - 1
    count = int(corpus.documents[shard])
    blocks = range(0, count, _DOCUMENTS_READ)

    def first_token(lo: int) -> int:
        return int(corpus.document_spans(shard, lo, lo + 1)[0][0])

    found = []
    for lo in blocks[bisect.bisect_right(blocks, start, key=first_token) - 1 :]:
        starts, ends = corpus.document_spans(shard, lo, min(lo + _DOCUMENTS_READ, count))
        for i in range(max(int(np.searchsorted(starts, start, "right")) - 1, 0), len(starts)):
            begin = int(starts[i])
            if begin >= stop:
                return found
            found.append((shard, lo + i, max(start, begin) - begin, min(stop, int(ends[i]) + 1) - begin))
    return found
