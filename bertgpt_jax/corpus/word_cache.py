"""Ids of words met before: texts repeat their words, and looking one up is many times quicker than encoding it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import chain, repeat

import numpy as np

from bertgpt_jax.corpus.view import ragged_index

MAX_WORDS = 1 << 18
MAX_CHARACTERS = 4 << 20
"""What is kept at most, before a text adds its words: some 50 MB. A full cache is emptied and fills with what is
frequent now."""

Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


class WordCache:
    """A bounded table of words and their ids; safe to use from several threads.

    Args:
        encode: ids of words one after another (int32) and the number of ids of each (int64).
        max_words, max_characters: a cache with more is emptied.
    """

    def __init__(self, encode: Encode, max_words: int = MAX_WORDS, max_characters: int = MAX_CHARACTERS):
        self._encode, self._max_words, self._max_characters = encode, max_words, max_characters
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._numbers: dict[str, int] = {}
        self._characters = self._used = 0
        self._starts, self._lengths = np.zeros(1024, np.int64), np.zeros(1024, np.int64)
        self._ids = np.zeros(1024, np.int32)

    def __len__(self) -> int:
        return len(self._numbers)

    def encode(self, texts: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the words of all texts one after another (int32) and the number of ids of each text (int64)."""
        counts = np.fromiter(map(len, texts), np.int64, len(texts))
        words = list(chain.from_iterable(texts))
        with self._lock:
            numbers = self._find(words)
            lengths = self._lengths[numbers]
            ids = self._ids[ragged_index(self._starts[numbers], lengths)]
        totals = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        last = np.cumsum(counts)
        return ids, totals[last] - totals[last - counts]

    def _find(self, words: list[str]) -> np.ndarray:
        """int64: the number of each word in the table, new words added."""
        numbers = np.fromiter(map(self._numbers.get, words, repeat(-1)), np.int64, len(words))
        missing = np.flatnonzero(numbers < 0)
        if len(missing):
            if len(self._numbers) > self._max_words or self._characters > self._max_characters:
                self._clear()
                missing = np.arange(len(words))
            absent = words if len(missing) == len(words) else [words[i] for i in missing.tolist()]
            self._add(list(dict.fromkeys(absent)))
            numbers[missing] = np.fromiter(map(self._numbers.__getitem__, absent), np.int64, len(absent))
        return numbers

    def _add(self, words: list[str]) -> None:
        ids, lengths = self._encode(words)
        known, used = len(self._numbers), self._used
        self._starts = _put(self._starts, known, used + np.cumsum(lengths) - lengths)
        self._lengths = _put(self._lengths, known, lengths)
        self._ids = _put(self._ids, used, ids)
        self._used += len(ids)
        self._characters += sum(map(len, words))
        self._numbers.update(zip(words, range(known, known + len(words)), strict=True))


def _put(array: np.ndarray, used: int, values: np.ndarray) -> np.ndarray:
    """`array` with `values` from position `used` on, in a new array of at least twice the size if it was full."""
    if used + len(values) > len(array):
        larger = np.zeros(max(2 * len(array), used + len(values)), array.dtype)
        larger[:used] = array[:used]
        array = larger
    array[used : used + len(values)] = values
    return array
