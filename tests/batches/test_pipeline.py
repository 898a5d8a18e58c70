"""Prefetching: order, errors, laziness, and the same batches from any number of threads."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.pairs import SentencePairs
from bertgpt_jax.batches.pipeline import prefetch
from bertgpt_jax.errors import ConfigError, DataError


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_elements_come_in_order(threads):
    def build(n: int) -> int:
        time.sleep(0.002 * (n % 3))
        return n * n

    assert list(prefetch(build, 5, 40, threads, 6)) == [n * n for n in range(5, 40)]
    assert list(prefetch(build, 5, 5, threads, 6)) == list(prefetch(build, 5, 3, threads, 6)) == []


@pytest.mark.parametrize("threads", [0, 2])
def test_any_value_is_passed_on(threads):
    assert list(prefetch(lambda n: None if n else {"a": n}, 0, 3, threads, 2)) == [{"a": 0}, None, None]


@pytest.mark.parametrize("threads", [0, 3])
def test_an_error_is_raised_where_its_element_is_asked_for(threads):
    def build(n: int) -> int:
        if n == 4:
            raise DataError("element 4 is bad")
        return n

    elements = prefetch(build, 0, 10, threads, 8)
    assert [next(elements) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(DataError, match="^element 4 is bad$"):
        next(elements)


def test_no_more_than_the_buffer_is_built_ahead():
    built: list[int] = []
    elements = prefetch(lambda n: built.append(n) or n, 0, 1000, 2, 4)
    assert next(elements) == 0
    time.sleep(0.1)
    assert max(built) <= 6
    elements.close()
    time.sleep(0.05)
    size = len(built)
    time.sleep(0.1)
    assert len(built) == size


def test_threads_overlap():
    together = threading.Barrier(2, timeout=20)  # neither passes before the other arrives
    assert list(prefetch(lambda n: together.wait() >= 0, 0, 4, 2, 4)) == [True] * 4


@pytest.mark.parametrize("threads, buffer", [(-1, 1), (2, 0), (0, -1)])
def test_bad_numbers(threads, buffer):
    with pytest.raises(ConfigError, match=str(min(threads, buffer))):
        prefetch(lambda n: n, 0, 1, threads, buffer)


def test_batches_are_the_same_from_any_number_of_threads(make_corpus):
    corpus = make_corpus(80, shards=2, whole_words=True)

    def batches(threads: int, start: int) -> list[dict[str, np.ndarray]]:
        data = Dataset(corpus, SentencePairs(), Masking(whole_word=True), sequence_length=32, batch_size=16)
        return list(prefetch(data.batch, start, 40, threads, 8))

    expected = batches(0, 0)
    for got, wanted in ((batches(8, 0), expected), (batches(2, 17), expected[17:])):
        for a, b in zip(got, wanted, strict=True):
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])
