"""Random masks that are the same however a batch is computed: on any mesh, all rows at once or some of them apart."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import random as random_extend

from bertgpt_jax.shapes import Array

SPLIT_ROWS = "split_rows"
"""Logical name of the mesh axis over which rows are already split by hand, where there is one (`parallel.replicas`)."""


def bernoulli(key: Array, probability: float, shape: tuple[int, ...]) -> Array:
    """bool of `shape`, True with `probability`; rows come first.

    Where a `shard_map` has split the rows, this is the part of the whole batch's mask that belongs to the rows at hand.
    For keys other than threefry's it is another mask instead, with the number of the part folded into the key.
    """
    part = part_of_rows()
    if part is not None and math.prod(shape[1:]) >= 2**32:
        key = jax.random.fold_in(key, part)
    elif part is not None and jax.random.key_impl(key) != _ROWS:
        key = row_key(key, part * shape[0])
    return jax.random.bernoulli(key, probability, shape)


def part_of_rows() -> Array | None:
    """Which part of the batch is at hand, where a `shard_map` has split its rows; None: all rows are."""
    axis = nn.logical_to_mesh_axes((SPLIT_ROWS,))[0]
    return None if axis is None else jax.lax.axis_index(axis)


def parts_of_rows() -> int:
    """How many parts `part_of_rows` counts."""
    axis = nn.logical_to_mesh_axes((SPLIT_ROWS,))[0]
    return 1 if axis is None else jax.lax.axis_size(axis)


def row_key(key: Array, first: Array, stride: int = 1) -> Array:
    """A key that draws rows `first`, `first + stride`, ... of what `key` draws for the whole batch.

    How many is the first dimension of the shape drawn. It splits and folds as `key` does. Of a key that is not
    threefry's, which cannot draw rows alone, it is another key for each `first`.

    Args:
        key: [].
        first: int [].
    """
    if jax.random.key_impl(key) != "threefry2x32":
        return jax.random.fold_in(key, first)
    place = jnp.stack([jnp.asarray(first), jnp.asarray(stride)]).astype(jnp.uint32)
    return jax.random.wrap_key_data(jnp.concatenate([jax.random.key_data(key), place]), impl=_ROWS)


def _bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    """What partitionable threefry gives at the rows' places in the whole array.

    It hashes each element's place, in row-major order, as two words (high, low).
    """
    size = math.prod(shape[1:])
    assert bit_width <= 32 and size < 2**32, "numbers and places in a row have 32 bits"
    within = jax.lax.iota(jnp.uint32, size).reshape(1, *shape[1:])
    rows = (key[2] + key[3] * jax.lax.iota(jnp.uint32, shape[0])).reshape(-1, *(1,) * (len(shape) - 1))
    low = rows * jnp.uint32(size) + within
    high = _high_word(rows, size) + (low < within).astype(jnp.uint32)
    first, second = random_extend.threefry2x32_p.bind(key[0], key[1], high, low)
    return (first ^ second).astype(f"uint{bit_width}")


def _high_word(x: Array, factor: int) -> Array:
    """The upper 32 bits of uint32 x times a factor below 2^32 (`jax.lax.mulhi` does not lower inside a `shard_map`)."""
    x0, x1 = x & 0xFFFF, x >> 16
    f0, f1 = jnp.uint32(factor & 0xFFFF), jnp.uint32(factor >> 16)
    middle = x1 * f0 + (x0 * f0 >> 16)
    return x1 * f1 + (middle >> 16) + ((x0 * f1 + (middle & 0xFFFF)) >> 16)


def _threefry(key: Array) -> Array:
    return jax.random.wrap_key_data(key[:2], impl="threefry2x32")


def _same_rows(keys: Array, key: Array) -> Array:
    """Key data of threefry keys [...] with the rows of `key`."""
    data = jax.random.key_data(keys)
    return jnp.concatenate([data, jnp.broadcast_to(key[2:], (*data.shape[:-1], 2))], -1)


def _no_seed(seed: Array) -> Array:
    raise NotImplementedError("keys of rows are made from threefry keys")


_ROWS = random_extend.define_prng_impl(
    key_shape=(4,),
    seed=_no_seed,
    split=lambda key, shape: _same_rows(jax.random.split(_threefry(key), shape), key),
    random_bits=_bits,
    fold_in=lambda key, data: _same_rows(jax.random.fold_in(_threefry(key), data), key),
    name="threefry_rows",
    tag="rows",
)
"""Threefry whose keys also say which rows they draw. Key data: threefry's two words, the first row, the stride."""
