"""Keys that draw some rows of what another key draws for a whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.nn.random import _high_word, row_key

KEY = jax.random.key(3)


@pytest.mark.parametrize(("first", "stride", "rows"), [(0, 1, 12), (2, 3, 3), (5, 1, 4), (11, 7, 1)])
def test_rows_are_those_of_the_whole_batch(first: int, stride: int, rows: int) -> None:
    whole = jax.random.bernoulli(KEY, 0.7, (12, 5, 7))
    part = jax.random.bernoulli(row_key(KEY, first, stride), 0.7, (rows, 5, 7))
    np.testing.assert_array_equal(part, whole[first::stride][:rows])
    assert 0 < part.mean() < 1


def test_keys_fold_and_split_as_the_whole_batchs_do() -> None:
    def draw(key, shape):
        return jax.random.uniform(jax.random.split(jax.random.fold_in(key, 9), 3)[1], shape)

    whole = draw(KEY, (8, 6))
    parts = jax.jit(jax.vmap(lambda i: draw(row_key(KEY, i, 4), (2, 6))))(jnp.arange(4))
    for i in range(4):
        np.testing.assert_array_equal(parts[i], whole[i::4])


@pytest.mark.parametrize("factor", [1, 7, 70_001, 2**32 - 1])
def test_the_upper_word_of_a_product(factor: int) -> None:
    numbers = np.array([0, 1, 70_000, 2**31 + 5, 2**32 - 1], np.uint32)
    assert _high_word(jnp.asarray(numbers), factor).tolist() == [int(n) * factor >> 32 for n in numbers]


def test_places_beyond_32_bits() -> None:
    """Row 2**20 of rows of 2**13 numbers begins at place 2**33: (high, low) = (2, 0)."""
    from jax.extend.random import threefry2x32_p

    words = jax.random.key_data(KEY)
    first, second = threefry2x32_p.bind(words[0], words[1], jnp.uint32([2, 2]), jnp.uint32([0, 1]))
    assert jax.random.bits(row_key(KEY, 2**20), (1, 2**13))[0, :2].tolist() == (first ^ second).tolist()


def test_keys_of_another_kind_differ_by_row() -> None:
    key = jax.random.key(0, impl="rbg")
    draws = [jax.random.bits(row_key(key, first, 2), (2, 3)).tolist() for first in (0, 1)]
    assert draws[0] != draws[1]
