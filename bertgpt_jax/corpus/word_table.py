"""Ids of short ASCII words met before, looked up for all words of a text at once.

A word of up to 16 bytes is two 64-bit numbers, so the table compares words exactly, and NumPy does it: no string is
made of a word that is known. Most of the time of a dictionary of strings goes into making and hashing them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from bertgpt_jax.corpus.view import ragged_index

LONGEST = 16
"""Bytes of the longest word that the table holds."""
_CAPACITY = 1 << 18
_SLOTS = 2 * _CAPACITY
_AT_ONCE = 1 << 17
"""Words looked up at a time: fewer than the capacity, so those of one time always fit."""
_FACTORS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
_MASKS = np.array([[(1 << 8 * min(n, 8)) - 1, (1 << 8 * max(n - 8, 0)) - 1] for n in range(LONGEST + 1)], np.uint64)
"""The first n of 16 bytes, as little-endian numbers."""

Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


class WordTable:
    """A bounded table of words and their ids, emptied when it is full; safe to use from several threads.

    Args:
        encode: ids of words one after another (int32) and the number of ids of each (int64).
    """

    def __init__(self, encode: Encode):
        self._encode = encode
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._slots = np.full(_SLOTS, -1, np.int32)
        self._words = np.zeros((_CAPACITY + 1, 2), np.uint64)
        self._starts, self._lengths = np.zeros(_CAPACITY, np.int64), np.zeros(_CAPACITY, np.int64)
        self._ids = np.zeros(0, np.int32)
        self._known = 0

    def __len__(self) -> int:
        return self._known

    def encode(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of words one after another (int32) and the number of ids of each (int64).

        Args:
            data: ASCII where the words are; no word holds a NUL.
            starts, lengths: where each word lies in `data`; at most `LONGEST` bytes.
        """
        keys = _pack(data, starts, lengths)
        rows = []
        with self._lock:
            for lo in range(0, len(starts), _AT_ONCE):
                part = slice(lo, lo + _AT_ONCE)
                numbers = self._find_or_add(keys[part], data, starts[part], lengths[part])
                counts = self._lengths.take(numbers)
                rows.append((self._ids.take(ragged_index(self._starts.take(numbers), counts)), counts))
        if not rows:
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        ids, counts = zip(*rows, strict=True)
        return np.concatenate(ids), np.concatenate(counts)

    def _find_or_add(self, keys: np.ndarray, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int64: the number of each word in the table, new words added."""
        numbers = self._find(keys)
        missing = np.flatnonzero(numbers < 0)
        if not len(missing):
            return numbers
        first = missing[_first_of_each(keys[missing])]
        if self._known + len(first) > _CAPACITY:
            self._clear()
            first = _first_of_each(keys)
            missing = np.arange(len(keys))
        spans = zip(starts[first].tolist(), (starts[first] + lengths[first]).tolist(), strict=True)
        self._add(keys[first], [data[lo:hi].decode("ascii") for lo, hi in spans])
        numbers[missing] = self._find(keys[missing])
        return numbers

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """int64: the number of each word, -1 for those that are not there."""
        slots = _first_slots(keys)
        numbers = self._slots.take(slots)
        wrong = np.flatnonzero(_differ(self._words.take(numbers, 0), keys) & (numbers >= 0))
        while len(wrong):
            slots[wrong] = (slots[wrong] + 1) & (_SLOTS - 1)
            numbers[wrong] = found = self._slots.take(slots[wrong])
            wrong = wrong[_differ(self._words.take(found, 0), keys.take(wrong, 0)) & (found >= 0)]
        return numbers

    def _add(self, keys: np.ndarray, words: list[str]) -> None:
        """Adds words that differ and are not there."""
        ids, lengths = self._encode(words)
        numbers = np.arange(self._known, self._known + len(words))
        self._words[numbers] = keys
        self._starts[numbers] = len(self._ids) + np.cumsum(lengths) - lengths
        self._lengths[numbers] = lengths
        self._ids = np.concatenate([self._ids, ids])
        self._known += len(words)
        slots = _first_slots(keys)
        while len(numbers):
            free = self._slots[slots] < 0
            self._slots[slots[free]] = numbers[free]
            rest = self._slots[slots] != numbers  # another word has the slot
            slots, numbers = (slots[rest] + 1) & (_SLOTS - 1), numbers[rest]


def _pack(data: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """uint64[N, 2]: the bytes of each word, zeros behind its end."""
    sixteens = np.ndarray((len(data) + 1,), "V16", data + bytes(LONGEST), strides=(1,))
    return sixteens[starts].view("<u8").reshape(-1, 2) & _MASKS.take(lengths, 0)


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which rows of two arrays of words differ."""
    return (a[:, 0] != b[:, 0]) | (a[:, 1] != b[:, 1])


def _first_slots(keys: np.ndarray) -> np.ndarray:
    """int64: where the search for each word begins."""
    mixed = keys[:, 0] * _FACTORS[0] + keys[:, 1] * _FACTORS[1]
    mixed = (mixed ^ (mixed >> np.uint64(29))) * _FACTORS[0]
    return (mixed >> np.uint64(40)).astype(np.int64) & (_SLOTS - 1)


def _first_of_each(keys: np.ndarray) -> np.ndarray:
    """The first position of each different word, ascending."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys.take(order, 0)
    new = np.ones(len(order), bool)
    new[1:] = _differ(ordered[1:], ordered[:-1])
    return np.sort(order[new])
