"""Rows drawn from several corpora by weight: which corpus row i belongs to, and its number there, in closed form.

The heaviest corpus takes every row that brings its count to the nearest whole number of its share; the next one does so
among the rows that are left, and so on. After any number of rows every corpus has its share within a row or two, and
the rows of each are numbered without gaps, so that each of its examples is used once an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bertgpt_jax.batches import bits
from bertgpt_jax.batches.checks import check_apart, check_rows
from bertgpt_jax.batches.dataset import Batch, Dataset
from bertgpt_jax.config import fingerprint

UNIT = 1 << 30
"""Shares are whole multiples of 1/UNIT: a corpus is off by a row after 2^31 of them."""
SLACK = 2
"""Rows by which a corpus may be ahead of its share."""


class Shares:
    """Rows dealt to corpora by fixed weights.

    Args:
        weights: of each corpus, in any unit; not all 0.
    """

    def __init__(self, weights: Sequence[float]):
        total = sum(weights)
        self._units = [max(round(weight / total * UNIT), 1) if weight else 0 for weight in weights]
        self._turns = sorted(range(len(weights)), key=lambda c: (-self._units[c], c))

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """int64[C, R]: how many of the first `rows` rows each corpus gets."""
        left, units = np.asarray(rows, np.int64), sum(self._units)
        counts = np.zeros((len(self._units), len(left)), np.int64)
        for corpus in self._turns:
            counts[corpus] = _nearest_share(left, self._units[corpus], units)
            left, units = left - counts[corpus], units - self._units[corpus]
        return counts

    def deal(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, number among the rows of that corpus) of each row, int64[R] both."""
        before = self.counts(rows)
        corpus = np.argmax(self.counts(np.asarray(rows, np.int64) + 1) - before, axis=0)
        return corpus, np.take_along_axis(before, corpus[None], axis=0)[0]


def _nearest_share(rows: np.ndarray, units: int, of: int) -> np.ndarray:
    """rows * units / of, to the nearest whole number (a half upwards), without overflow."""
    if not units:
        return np.zeros_like(rows)
    whole, rest = np.divmod(rows, of)
    return whole * units + (2 * rest * units + of) // (2 * of)


class Mixture:
    """Batches of a split of several corpora; what `Dataset` offers for one.

    The rows of a batch are shuffled, so that a corpus does not always lie on the same devices.

    Args:
        parts: by name, in the order of the weights; all of one split and sequence length.
        weights: of the corpora from row 0 on.
        changes: (first row, weights from there on), in order.
        batch_size: B; that of the parts counts for evaluation alone, whose batches are of one part each.
        seed: of the places of rows in a batch.
        epoch_rows: rows of an epoch of the mixture; by default those of an epoch of every corpus.

    Raises:
        ConfigError: the rows of `contiguous_streams`, each of which goes on where one of the batch before ended.
    """

    def __init__(
        self,
        parts: Mapping[str, Dataset],
        weights: Sequence[float],
        changes: Sequence[tuple[int, Sequence[float]]] = (),
        *,
        batch_size: int,
        seed: int = 0,
        epoch_rows: int | None = None,
    ):
        first = next(iter(parts.values()))
        check_apart(first.examples.kind, "a mixture")
        self.parts, self.names, self.seed = dict(parts), list(parts), seed
        self.split, self.sequence_length, self.batch_size = first.split, first.sequence_length, batch_size
        self._epoch_rows = epoch_rows
        self._firsts = np.array([0, *(row for row, _ in changes)], np.int64)
        self._weights = [tuple(map(float, w)) for w in (weights, *(w for _, w in changes))]
        self._shares = [Shares(w) for w in self._weights]
        base = np.zeros((len(parts), 1), np.int64)
        self._bases = [base]
        for shares, rows in zip(self._shares, np.diff(self._firsts), strict=False):
            base = base + shares.counts(np.array([rows]))
            self._bases.append(base)

    # ------------------------------------------------------------ sizes

    @property
    def tokens_per_batch(self) -> int:
        """B * T, padding counted."""
        return self.batch_size * self.sequence_length

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that batches depend on."""
        parts = [[name, part.fingerprint] for name, part in self.parts.items()]
        return fingerprint([parts, self._firsts.tolist(), self._weights, self.batch_size, self.seed])

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """Rows of an epoch of the mixture."""
        return self._epoch_rows or sum(part.rows_per_epoch(epoch) for part in self.parts.values())

    def epoch_of(self, n: int) -> float:
        """Epochs seen before batch n."""
        return n * self.batch_size / self.rows_per_epoch(0)

    def seen(self, rows: int) -> dict[str, int]:
        """How many of rows 0..rows-1 are of each corpus."""
        stretch = int(np.searchsorted(self._firsts, rows, "right")) - 1
        counts = self._bases[stretch] + self._shares[stretch].counts(np.array([rows - self._firsts[stretch]]))
        return dict(zip(self.names, counts[:, 0].tolist(), strict=True))

    # ------------------------------------------------------------ training batches

    def batch(self, n: int, rows: np.ndarray | None = None) -> Batch:
        """The arrays of batch n; see `Dataset.batch`."""
        if n < 0:
            raise IndexError(f"batch {n}: batches are numbered from 0")
        return self.at(self.numbers(n * self.batch_size, self.batch_size, rows))

    def describe(self, n: int, rows: np.ndarray | None = None) -> list[dict[str, Any]]:
        """As `Dataset.describe`; `corpus` is the name of the corpus, and `epoch` counts its own."""
        return self.describe_at(self.numbers(n * self.batch_size, self.batch_size, rows))

    def numbers(self, first: int, size: int, rows: np.ndarray | None = None) -> np.ndarray:
        """int64[R]: the numbers of rows of a batch that holds first..first+size-1, shuffled."""
        key = bits.stream(self.seed, "mixture-places", first)
        return first + bits.permuted(key, size, check_rows(rows, size))

    def at(self, numbers: np.ndarray) -> Batch:
        """The arrays of the rows of these numbers, in any order."""
        corpus, number = self._deal(numbers)
        whole: Batch = {}
        for c in np.unique(corpus) if len(corpus) else [0]:
            here = corpus == c
            for name, value in self.parts[self.names[c]].at(number[here]).items():
                whole.setdefault(name, np.empty((len(corpus), *value.shape[1:]), value.dtype))[here] = value
        return whole

    def describe_at(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """`describe` of the rows of these numbers."""
        corpus, number = self._deal(numbers)
        rows: list[dict[str, Any]] = [{} for _ in corpus]
        for c in np.unique(corpus):
            here = np.flatnonzero(corpus == c)
            for i, row in zip(here, self.parts[self.names[c]].describe_at(number[here]), strict=True):
                rows[i] = {"corpus": self.names[c], **row}
        return rows

    def _deal(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, number there) of rows, int64[R] both."""
        numbers = np.asarray(numbers, np.int64)
        corpus, rank = np.zeros_like(numbers), np.zeros_like(numbers)
        stretch = np.searchsorted(self._firsts, numbers, "right") - 1
        for s in np.unique(stretch):
            here = stretch == s
            corpus[here], rank[here] = self._shares[s].deal(numbers[here] - self._firsts[s])
            rank[here] += self._bases[s][corpus[here], 0]
        return corpus, rank

    # ------------------------------------------------------------ evaluation batches

    def eval_rows(self) -> int:
        """Rows of an evaluation of the whole split."""
        return sum(part.eval_rows() for part in self.parts.values())

    def eval_batches(self) -> int:
        """Batches of an evaluation of the whole split: those of each part, one after another."""
        return sum(part.eval_batches() for part in self.parts.values())

    def eval_batch(self, i: int, rows: np.ndarray | None = None) -> Batch:
        """Batch i of an evaluation; all its rows are of one part."""
        beyond = i
        for part in self.parts.values():
            if 0 <= beyond < part.eval_batches():
                return part.eval_batch(beyond, rows)
            beyond -= part.eval_batches()
        raise IndexError(f"evaluation batch {i} of {self.eval_batches()}")

    def eval_fingerprint(self) -> str:
        """sha256 (hex) over all evaluation rows, part by part."""
        return fingerprint([[name, part.eval_fingerprint()] for name, part in self.parts.items()])


def parts_of(data: Dataset | Mixture) -> dict[str, Dataset]:
    """The parts of a mixture; of a single corpus itself, under an empty name."""
    return data.parts if isinstance(data, Mixture) else {"": data}
