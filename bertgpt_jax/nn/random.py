"""Random masks that are the same on every mesh, also where a program computes its rows apart from the others'."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from bertgpt_jax.shapes import Array

SPLIT_ROWS = "split_rows"
"""Logical name of the mesh axis over which rows are already split by hand, where there is one (`parallel.replicas`)."""


def bernoulli(key: Array, probability: float, shape: tuple[int, ...]) -> Array:
    """bool of `shape`, True with `probability`; rows come first.

    Where a `shard_map` has split the rows, this is the part of the whole batch's mask that belongs to the rows at hand.
    For keys other than threefry's it is another mask instead, with the number of the part folded into the key.
    """
    axis = nn.logical_to_mesh_axes((SPLIT_ROWS,))[0]
    if axis is None:
        return jax.random.bernoulli(key, probability, shape)
    part = jax.lax.axis_index(axis)
    if jax.random.key_impl(key) != "threefry2x32" or math.prod(shape[1:]) >= 2**32:
        return jax.random.bernoulli(jax.random.fold_in(key, part), probability, shape)
    return _uniform_rows(key, part, shape) < probability


def _uniform_rows(key: Array, part: Array, shape: tuple[int, ...]) -> Array:
    """Rows part * shape[0] .. of `jax.random.uniform(key, (parts * shape[0], *shape[1:]))`.

    Partitionable threefry hashes each element's place in the array, in row-major order, as two words (high, low); 23
    bits become the mantissa of a number in [1, 2).
    """
    size = math.prod(shape[1:])
    within = jax.lax.iota(jnp.uint32, size).reshape(1, *shape[1:])
    rows = part.astype(jnp.uint32) * jnp.uint32(shape[0]) + jax.lax.iota(jnp.uint32, shape[0])
    rows = rows.reshape(-1, *(1,) * (len(shape) - 1))
    low = rows * jnp.uint32(size) + within
    high = _high_word(rows, size) + (low < within).astype(jnp.uint32)
    words = jax.random.key_data(key)
    first, second = threefry2x32_p.bind(words[0], words[1], high, low)
    mantissa = jax.lax.shift_right_logical(first ^ second, jnp.uint32(9)) | jnp.uint32(0x3F800000)
    return jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0


def _high_word(x: Array, factor: int) -> Array:
    """The upper 32 bits of uint32 x times a factor below 2^32 (`jax.lax.mulhi` does not lower inside a `shard_map`)."""
    x0, x1 = x & 0xFFFF, x >> 16
    f0, f1 = jnp.uint32(factor & 0xFFFF), jnp.uint32(factor >> 16)
    middle = x1 * f0 + (x0 * f0 >> 16)
    return x1 * f1 + (middle >> 16) + ((x0 * f1 + (middle & 0xFFFF)) >> 16)
