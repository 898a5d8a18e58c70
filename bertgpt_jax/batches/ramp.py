"""Batches whose size or length changes on the way: which rows batch n holds, in closed form."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from bertgpt_jax.batches.checks import check_apart
from bertgpt_jax.batches.dataset import Batch, Dataset
from bertgpt_jax.batches.mixture import Mixture, parts_of

Change = tuple[int, int]
"""(number of the first batch, batch size or sequence length from there on)."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Batches of one shape that follow one another.

    Attributes:
        first: number of the first of them.
        batch_size, sequence_length: their shape.
        tokens: input positions of all batches before, padding counted.
        rows: rows of all batches before, by sequence length.
    """

    first: int
    batch_size: int
    sequence_length: int
    tokens: int
    rows: Mapping[int, int]


class Ramp:
    """The shapes of batches 0, 1, ...

    Args:
        batch_sizes, sequence_lengths: what changes when, each beginning with batch 0 and in order; the last ones stay.
    """

    def __init__(self, batch_sizes: tuple[Change, ...], sequence_lengths: tuple[Change, ...]):
        self.segments: list[Segment] = []
        for first in sorted({first for first, _ in (*batch_sizes, *sequence_lengths)}):
            tokens, rows = (self.tokens_before(first), self.rows_before(first)) if self.segments else (0, {})
            size, length = (_value_at(changes, first) for changes in (batch_sizes, sequence_lengths))
            self.segments.append(Segment(first, size, length, tokens, rows))

    def index(self, n: int) -> int:
        """Which segment batch n is in."""
        if n < 0:
            raise IndexError(f"batch {n}: batches are numbered from 0")
        return bisect.bisect_right(self.segments, n, key=lambda segment: segment.first) - 1

    def segment(self, n: int) -> Segment:
        """The segment batch n is in."""
        return self.segments[self.index(n)]

    def tokens_before(self, n: int) -> int:
        """Input positions of batches 0..n-1, padding counted."""
        segment = self._last_before(n)
        return segment.tokens + (n - segment.first) * segment.batch_size * segment.sequence_length

    def rows_before(self, n: int) -> dict[int, int]:
        """Rows of batches 0..n-1 by their sequence length."""
        segment = self._last_before(n)
        length = segment.sequence_length
        drawn = segment.rows.get(length, 0) + (n - segment.first) * segment.batch_size
        return {**segment.rows, length: drawn}

    def _last_before(self, n: int) -> Segment:
        return self.segments[max(bisect.bisect_left(self.segments, n, key=lambda segment: segment.first) - 1, 0)]

    def batches_for(self, amount: Fraction | int, worth: Callable[[int], Fraction | int]) -> int:
        """The fewest batches, at least one, whose rows are together worth `amount`.

        Args:
            worth: of a row, from its sequence length.
        """
        left = Fraction(amount)
        for segment, following in zip(self.segments, [*self.segments[1:], None], strict=True):
            each = segment.batch_size * Fraction(worth(segment.sequence_length))
            needed = max(math.ceil(left / each), 0)
            if following is None or needed <= following.first - segment.first:
                return max(segment.first + needed, 1)
            left -= (following.first - segment.first) * each
        raise AssertionError("the last segment has no end")


def _value_at(changes: tuple[Change, ...], n: int) -> int:
    return [value for first, value in changes if first <= n][-1]


def batch_ramp(sizes: Sequence[tuple[float, int]], sequence_length: int) -> tuple[Change, ...]:
    """A ramp of the batch size whose changes are given in tokens, for configs.

    GPT-3's grows from 32k tokens to the full batch over the first 4 to 12 billion (Brown et al. 2020, appendix B);
    Megatron-LM's 175B script does it by `((0, 16), (2.4e9, 320), (4.8e9, 624), (7.2e9, 928), (9.6e9, 1232), (12e9,
    1536))` at 2,048 tokens a row.

    Args:
        sizes: (tokens seen, rows of a batch from the next batch on), the first from 0 tokens on.
    """
    changes, tokens = [(0, sizes[0][1])], 0
    for (_, size), (seen, following) in zip(sizes, sizes[1:], strict=False):
        steps = math.ceil((seen - tokens) / (size * sequence_length))
        tokens += steps * size * sequence_length
        changes.append((changes[-1][0] + steps, following))
    return tuple(changes)


def without_weight(batch: Batch, rows: np.ndarray) -> Batch:
    """`batch` with weight 0 in some rows, which then add nothing to any sum: they fill up what a mesh does not divide.

    Args:
        rows: bool [B], True for those.
    """
    if not rows.any():
        return batch
    zeroed = {name: array.copy() for name, array in batch.items() if name.endswith("weights")}
    for array in zeroed.values():
        array[rows] = 0
    return {**batch, **zeroed}


class Ramped:
    """Batches of a split along a ramp, each row of an epoch used once whatever the batch size.

    Every sequence length cuts the text anew and has rows, numbers and epochs of its own: a length that comes back goes
    on where it was left.

    Args:
        data: for each sequence length of the ramp what has its rows.

    Raises:
        ConfigError: a change of shape with `contiguous_streams`.
    """

    def __init__(self, ramp: Ramp, data: Mapping[int, Dataset | Mixture]):
        if len(ramp.segments) > 1:
            for part in data.values():
                check_apart(next(iter(parts_of(part).values())).examples.kind, "a ramp")
        self.ramp, self.data = ramp, data

    def batch(self, n: int, rows: np.ndarray | None = None) -> Batch:
        """The arrays of batch n; `rows` as in `Dataset.batch`."""
        data, numbers = self._numbers(n, rows)
        return data.at(numbers)

    def describe(self, n: int, rows: np.ndarray | None = None) -> list[dict[str, Any]]:
        """What the rows of batch n are made of; see `Dataset.describe`."""
        data, numbers = self._numbers(n, rows)
        return data.describe_at(numbers)

    def _numbers(self, n: int, rows: np.ndarray | None) -> tuple[Dataset | Mixture, np.ndarray]:
        segment = self.ramp.segment(n)
        data = self.data[segment.sequence_length]
        first = self.ramp.rows_before(n).get(segment.sequence_length, 0)
        return data, data.numbers(first, segment.batch_size, rows)

    def rows_per_epoch(self, sequence_length: int) -> int:
        """Rows of the first epoch at a sequence length."""
        return self.data[sequence_length].rows_per_epoch(0)

    def epochs_before(self, n: int) -> float:
        """Epochs that batches 0..n-1 come to (pairs: nearly exact)."""
        return sum(rows / self.rows_per_epoch(length) for length, rows in self.ramp.rows_before(n).items())

    def seen_before(self, n: int) -> dict[str, dict[str, float]]:
        """For each corpus of a mixture the `rows`, `tokens` and `epochs` of batches 0..n-1; empty for one corpus."""
        seen: dict[str, dict[str, float]] = {}
        for length, drawn in self.ramp.rows_before(n).items():
            data = self.data[length]
            for name, rows in data.seen(drawn).items() if isinstance(data, Mixture) else ():
                found = seen.setdefault(name, {"rows": 0, "tokens": 0, "epochs": 0.0})
                found["rows"] += rows
                found["tokens"] += rows * length
                found["epochs"] += rows / data.parts[name].rows_per_epoch(0)
        return seen
