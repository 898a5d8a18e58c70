"""Random access to rows of varying number: document windows, planned one by one, and the index over their rows.

The documents of a split are taken in windows, each planned (which sentences make which row) from lengths alone. An
epoch's index holds one number of rows a window; a row is found in it by binary search. Windows are shuffled in blocks,
and the rows of a block among each other, so that few plans are needed at a time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from bertgpt_jax.batches import bits
from bertgpt_jax.corpus.view import Corpus

DOCUMENTS_PER_WINDOW = 1024
TOKENS_PER_WINDOW = 1 << 21
"""A window of long documents ends earlier, so that planning one takes bounded memory."""
WINDOWS_PER_BLOCK = 64
PLANS_KEPT = 2 * WINDOWS_PER_BLOCK
"""A batch draws from one block, and from the next where one ends."""


def document_windows(corpus: Corpus, split: str) -> np.ndarray:
    """int64[W, 3]: (shard, lo, hi) of each window: documents lo..hi of a shard, of even size within the shard.

    At most `DOCUMENTS_PER_WINDOW` documents, and about `TOKENS_PER_WINDOW` tokens unless one document is longer.
    """
    windows = []
    for shard, lo, hi in corpus.split_documents(split):
        starts, ends = corpus.document_spans(shard, lo, hi)
        # a document fills 1/1024 of a window by its number and len/2^21 by its length; both in units of 2^-21
        filled = np.cumsum(TOKENS_PER_WINDOW // DOCUMENTS_PER_WINDOW + (ends - starts))
        needed = -(-int(filled[-1]) // TOKENS_PER_WINDOW)
        cuts = np.searchsorted(filled, np.arange(1, needed) * int(filled[-1]) // needed, "right")
        cuts = np.unique(np.concatenate([[lo], lo + cuts, [hi]]))
        windows += [(shard, a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    return np.array(windows, np.int64).reshape(-1, 3)


class Plan(Protocol):
    """What a window's rows are made of.

    `tally` is a number that the planner wants to know of all windows, such as the documents it could use fully.
    """

    tally: int

    def __len__(self) -> int: ...


P = TypeVar("P", bound=Plan)


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """The index of one epoch.

    Attributes:
        row_base: int64[W+1], the number of each window's first row.
        blocks: int64[K], blocks in the order they are drawn.
        rank_base: int64[K+1], the rank of the first row of each block in that order.
        tally: sum of the plans' tallies.
    """

    row_base: np.ndarray
    blocks: np.ndarray
    rank_base: np.ndarray
    tally: int


class RowIndex(Generic[P]):
    """Rows of planned windows.

    Args:
        windows: number of windows W.
        plan: (epoch, window) to its plan; pure.
        seed: of the order.
        name: identifies corpus, settings and seed in the cache.
        cache_dir: where the rows of each window are kept between runs, or None.
        plans_kept: plans in memory.
        same_every_epoch: every epoch has the plans of the first, in an order of its own.
    """

    def __init__(
        self,
        windows: int,
        plan: Callable[[int, int], P],
        seed: int,
        name: str,
        cache_dir: Path | None,
        plans_kept: int = PLANS_KEPT,
        same_every_epoch: bool = False,
    ):
        self._windows, self._make_plan, self._seed, self._name = windows, plan, seed, name
        self._cache_dir, self._same_every_epoch = cache_dir, same_every_epoch
        self._plans: Memo[tuple[int, int], P] = Memo(plans_kept)
        self._epochs: Memo[int, _Epoch] = Memo(4)

    def plan(self, epoch: int, window: int) -> P:
        """The plan of a window, from memory if it is there."""
        epoch = self._planned(epoch)
        return self._plans.get((epoch, window), lambda: self._make_plan(epoch, window))

    def count(self, epoch: int) -> int:
        """Rows of an epoch; plans all its windows unless their rows are cached."""
        return int(self._epoch(epoch).row_base[-1])

    def tally(self, epoch: int) -> int:
        """Sum of the tallies of an epoch's plans."""
        return self._epoch(epoch).tally

    def order(self, epoch: int, ranks: np.ndarray) -> np.ndarray:
        """The rows that an epoch's order puts at `ranks`, int64[R]."""
        index = self._epoch(epoch)
        place = np.searchsorted(index.rank_base, ranks, "right") - 1
        rows = np.empty(len(ranks), np.int64)
        for p in np.unique(place):
            here, block = place == p, int(index.blocks[p])
            key = bits.stream(self._seed, "row-order", epoch, block)
            size = int(index.rank_base[p + 1] - index.rank_base[p])
            first = index.row_base[block * WINDOWS_PER_BLOCK]
            rows[here] = first + bits.permuted(key, size, ranks[here] - index.rank_base[p])
        return rows

    def locate(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(window, row in the window) of each row, int64[R] both."""
        base = self._epoch(epoch).row_base
        window = np.searchsorted(base, rows, "right") - 1
        return window, rows - base[window]

    def _epoch(self, epoch: int) -> _Epoch:
        return self._epochs.get(epoch, lambda: self._index(epoch))

    def _index(self, epoch: int) -> _Epoch:
        table = self._measured(epoch)
        row_base = np.concatenate([np.zeros(1, np.int64), np.cumsum(table[:, 0], dtype=np.int64)])
        edges = np.append(np.arange(0, self._windows, WINDOWS_PER_BLOCK), self._windows)
        rows = np.diff(row_base[edges])
        blocks = bits.permuted(bits.stream(self._seed, "block-order", epoch), len(rows), np.arange(len(rows)))
        rank_base = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows[blocks])])
        return _Epoch(row_base, blocks, rank_base, int(table[:, 1].sum(dtype=np.int64)))

    def _planned(self, epoch: int) -> int:
        """The epoch whose plans this one uses."""
        return 0 if self._same_every_epoch else epoch

    def _measured(self, epoch: int) -> np.ndarray:
        """int32[W, 2]: rows and tally of each window."""
        epoch = self._planned(epoch)
        path = self._cache_dir / f"rows-{self._name}-{epoch}.bin" if self._cache_dir else None
        table = read_table(path, self._windows) if path else None
        if table is None:
            plans = (self.plan(epoch, window) for window in range(self._windows))
            table = np.array([(len(plan), plan.tally) for plan in plans], np.int32).reshape(-1, 2)
            if path:
                write_table(path, table)
        return table


def read_table(path: Path, rows: int) -> np.ndarray | None:
    """int32[rows, 2] as `write_table` left it; None if it is not there or not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    whole = len(data) == 32 + 8 * rows and hashlib.sha256(data[32:]).digest() == data[:32]
    return np.frombuffer(data, "<i4", offset=32).reshape(-1, 2) if whole else None


def write_table(path: Path, table: np.ndarray) -> None:
    """Caches a table behind its sha256. A directory that cannot be written costs time at the next start, no more."""
    data = np.ascontiguousarray(table, "<i4").tobytes()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(hashlib.sha256(data).digest() + data)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


K = TypeVar("K")
V = TypeVar("V")


class Memo(Generic[K, V]):
    """The values last used, at most `capacity`; each is made once, though several threads ask for it."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._lock = threading.Lock()
        self._cells: collections.OrderedDict[K, tuple[threading.Lock, list[V]]] = collections.OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of `key`, made by `make()` if it is not here."""
        with self._lock:
            lock, value = self._cells.setdefault(key, (threading.Lock(), []))
            self._cells.move_to_end(key)
            while len(self._cells) > self._capacity:
                self._cells.popitem(last=False)
        with lock:
            if not value:
                value.append(make())
            return value[0]
