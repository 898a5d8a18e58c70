"""Which tokens of a row are predicted: single tokens, whole words, or runs of several of them, all rows at once."""

from __future__ import annotations

import numpy as np

from bertgpt_jax.batches import bits

_NEVER = np.uint64(0xFFFFFFFFFFFFFFFF)
"""Sort key of what cannot be chosen."""
_POSITION = np.uint64(0xFFFFFFFF)


def random_order(key: bits.Key, examples: np.ndarray, length: int) -> np.ndarray:
    """uint64[R, T]: a random order of each row's positions; the low half is the position, so no two are equal."""
    keys = bits.words(key, examples, length).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(length, dtype=np.uint64)
    return keys


def choose_tokens(keys: np.ndarray, wanted: np.ndarray, maskable: np.ndarray, width: int) -> np.ndarray:
    """bool[R, T]: the `wanted` maskable positions of each row that come first in the random order."""
    keys = np.where(maskable, keys, _NEVER)
    if width < keys.shape[1]:
        keys = np.partition(keys, width, axis=1)[:, :width]
    keys = np.sort(keys, axis=1)
    row, rank = np.nonzero((np.arange(keys.shape[1]) < wanted[:, None]) & (keys != _NEVER))
    chosen = np.zeros(maskable.shape, bool)
    chosen[row, (keys[row, rank] & _POSITION).astype(np.int64)] = True
    return chosen


def choose_words(keys: np.ndarray, wanted: np.ndarray, maskable: np.ndarray, word_start: np.ndarray) -> np.ndarray:
    """bool[R, T]: whole words in random order, each taken if the row's number still allows all its tokens."""
    rows, length = maskable.shape
    start, number, size = _units(maskable, word_start)
    keys = np.sort(np.where(start, keys, _NEVER), axis=1)
    first = np.where(keys != _NEVER, keys & _POSITION, 0).astype(np.int64)
    word = np.take_along_axis(number, first, axis=1)
    # the ranks lead, so that a step of the loop reads consecutive memory; what is no word never fits
    size_by_rank = np.where(keys != _NEVER, np.take_along_axis(size, word, axis=1), length + 1).T.copy()
    taken_by_rank = np.zeros((length, rows), bool)
    left = wanted.copy()
    for fits, this in zip(taken_by_rank, size_by_rank, strict=True):
        np.less_equal(this, left, out=fits)
        left -= this * fits
        if not left.any():
            break
    taken = np.zeros((rows, length), bool)
    rank, row = np.nonzero(taken_by_rank)
    taken[row, word[row, rank]] = True
    return maskable & np.take_along_axis(taken, number.clip(0), axis=1)


def choose_spans(
    keys: np.ndarray,
    draws: np.ndarray,
    wanted: np.ndarray,
    maskable: np.ndarray,
    word_start: np.ndarray | None,
    longest: int,
) -> np.ndarray:
    """bool[R, T]: runs of 1 to `longest` words, in the random order of their first words.

    The number of words n of a run is drawn with p(n) ~ 1/n, cut where the row or a token that may not be chosen ends
    it, and lowered until its tokens fit what is left of the row's number. A run that touches one already chosen, or
    whose first word alone is too long, is passed over (google-research/albert and Megatron-LM `masked_dataset.py`;
    there runs also cross a [SEP], which is cut here).

    Args:
        draws: uint32[R, T], random words for the number of words of the run that begins at a position.
        word_start: bool[R, T]; None counts single tokens.
    """
    start, number, size = _units(maskable, word_start)
    rows, length = maskable.shape
    before = np.zeros((rows, length + longest + 1), np.int64)
    np.cumsum(size, axis=1, out=before[:, 1 : length + 1])
    before[:, length + 1 :] = before[:, length : length + 1]
    stop = _run_stops(maskable, start, number)
    weights = 1 / np.arange(1, longest + 1)
    bounds = np.rint(2**32 * np.cumsum(weights)[:-1] / weights.sum()).astype(np.uint64)
    drawn = 1 + np.searchsorted(bounds, draws.astype(np.uint64), "right")
    keys = np.sort(np.where(start, keys, _NEVER), axis=1)
    first = (keys & _POSITION).clip(max=np.uint64(length - 1)).astype(np.int64)
    unit, count = np.take_along_axis(number, first, axis=1), np.take_along_axis(drawn, first, axis=1)
    taken = np.zeros((rows, length + longest), bool)
    left, units = wanted.copy(), start.sum(1)
    ahead = np.arange(longest)
    row = np.flatnonzero((left > 0) & (units > 0))
    for rank in range(int(units.max(initial=0))):
        at = unit[row, rank]
        n = np.minimum(count[row, rank], stop[row, at] - at)
        run = at[:, None] + ahead
        tokens = before[row[:, None], run + 1] - before[row, at][:, None]
        n = ((tokens <= left[row, None]) & (ahead < n[:, None])).sum(1)
        inside = ahead < n[:, None]
        fits = (n > 0) & ~(taken[row[:, None], run] & inside).any(1)
        r, k = np.nonzero(inside & fits[:, None])
        taken[row[r], run[r, k]] = True
        left[row] -= np.where(fits, tokens[np.arange(len(row)), n - 1], 0)
        row = row[(left[row] > 0) & (units[row] > rank + 1)]
        if not len(row):
            break
    return maskable & np.take_along_axis(taken, number.clip(0), axis=1)


def _units(maskable: np.ndarray, word_start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the words (or single tokens) of each row.

    Returns:
        `start` bool[R, T], where one begins; `number` int64[R, T], which of the row's it is, -1 before the first;
        `size` int64[R, T], the tokens of each by its number.
    """
    rows, length = maskable.shape
    start = maskable
    if word_start is not None:
        # a token that may not be chosen parts words: what follows it begins a new one
        start = maskable & (word_start | _after_gap(maskable))
    number = np.cumsum(start, axis=1) - 1
    row_base = length * np.arange(rows)[:, None]
    size = np.bincount((number + row_base)[maskable], minlength=rows * length).reshape(rows, length)
    return start, number, size


def _after_gap(maskable: np.ndarray) -> np.ndarray:
    """bool[R, T]: the first token, and those behind one that may not be chosen."""
    after_gap = np.ones_like(maskable)
    after_gap[:, 1:] = ~maskable[:, :-1]
    return after_gap


def _run_stops(maskable: np.ndarray, start: np.ndarray, number: np.ndarray) -> np.ndarray:
    """int64[R, T]: for each word by its number, that of the first word behind the next gap."""
    rows, length = maskable.shape
    begins = np.full((rows, length + 1), length, np.int64)
    row, position = np.nonzero(start & _after_gap(maskable))
    begins[row, number[row, position]] = number[row, position]
    begins[np.arange(rows), start.sum(1)] = start.sum(1)
    return np.minimum.accumulate(begins[:, :0:-1], axis=1)[:, ::-1]
