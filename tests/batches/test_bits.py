"""Philox against its published vectors; what the draws and the permutation promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgpt_jax.batches import bits

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, words
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    many = np.tile(np.array(counter, np.uint32), (bits._LANES + 3, 1))  # more lanes than are worked on at a time
    got = bits.philox4x32(key, many)
    assert got.dtype == np.uint32
    assert (got == np.array(words, np.uint32)).all()


def test_streams_differ_by_seed_and_purpose_and_never_change():
    keys = {bits.stream(*names) for names in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (10, "a")]}
    assert len(keys) == 6
    assert bits.stream(0, "row-order", 0) == (505746031, 4188295335)


@given(st.integers(0, 2**40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_words_depend_on_their_index_alone(index, count, sub):
    key = (5, 7)
    alone = bits.words(key, np.array([index]), count, sub)
    among = bits.words(key, np.array([3, index, index + 1]), count + 9, np.array([0, sub, sub]))
    np.testing.assert_array_equal(alone[0], among[1, :count])
    assert not np.array_equal(among[1], among[2])


def test_words_use_both_halves_of_the_index():
    low, high = bits.words((1, 2), np.array([7, 7 + 2**32]), 4)
    assert (low != high).all()


@given(st.integers(1, 2**32))
def test_below_covers_its_range_and_no_more(bound):
    extremes = bits.below(np.array([0, 2**32 - 1], np.uint32), bound)
    assert extremes.tolist() == [0, bound - 1]


def test_happens_never_and_always():
    words = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    assert not bits.happens(words, 0.0).any()
    assert bits.happens(words, 1.0).all()
    assert bits.happens(words, 0.5).tolist() == [True, True, True, False, False]


@given(st.lists(st.integers(0, 700), min_size=1, max_size=8))
def test_coin_sums_count_the_bits_of_the_stream(flips):
    key, index = (9, 9), np.arange(len(flips)) + 2**33
    words = bits.words(key, index, 24, sub=4)
    expected = [sum(int(words[i, b // 32]) >> (b % 32) & 1 for b in range(count)) for i, count in enumerate(flips)]
    assert bits.coin_sums(key, index, np.array(flips), sub=4).tolist() == expected


@settings(max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_permuted_is_a_permutation(size, key):
    image = bits.permuted((key, 1), size, np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permuted_position_by_position_and_far_beyond_32_bits():
    size = 10**15 + 37
    positions = np.array([0, 1, 2**40, size - 1])
    image = bits.permuted((1, 2), size, positions)
    assert [int(bits.permuted((1, 2), size, positions[i : i + 1])[0]) for i in range(4)] == image.tolist()
    assert len(set(image.tolist())) == 4 and (0 <= image).all() and (image < size).all()
    with pytest.raises(IndexError, match="10"):
        bits.permuted((1, 2), 10, np.array([10]))


def test_permuted_is_uniform_for_small_sizes():
    # 4! = 24 outcomes over 4,800 keys: chi-square with 23 degrees of freedom exceeds 49.7 once in 1,000
    seen = {order: 0 for order in itertools.permutations(range(4))}
    for i in range(4800):
        seen[tuple(bits.permuted(bits.stream(i, "uniform"), 4, np.arange(4)).tolist())] += 1
    assert sum((n - 200) ** 2 / 200 for n in seen.values()) < 49.7


def test_permuted_spreads_neighbours():
    size = 20_000
    image = bits.permuted((3, 4), size, np.arange(size)).astype(float)
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.025  # 3.5 standard errors
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.025
    quarters = np.add.reduceat(image < size / 2, np.arange(0, size, size // 40))
    assert abs(quarters - 250).max() < 55  # 500 draws each, standard deviation 11
