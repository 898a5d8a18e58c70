"""How a sequence lies on a mesh: split as the logical axis `length` says, in its own order or in zigzag.

Zigzag cuts it into 2n chunks, of which shard i holds i and 2n-1-i: under a causal mask every shard then has the same
work (Grattafiori et al. 2024, section 3.3.2). Nothing else than attention and dropout need know.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bertgpt_jax.shapes import Array


class Split(NamedTuple):
    """Mesh axes, of more than one device, that split the sequence, and into how many shards."""

    axes: tuple[str, ...]
    shards: int


WHOLE = Split((), 1)
"""Not split."""


def split() -> Split:
    """How the mesh in force splits sequences; without a mesh, or without rules, they are whole."""
    mesh = jax.sharding.get_abstract_mesh()
    (named,) = nn.logical_to_mesh_axes(("length",))
    if mesh.empty or named is None:
        return WHOLE
    axes = tuple(axis for axis in ((named,) if isinstance(named, str) else named) if mesh.shape[axis] > 1)
    return Split(axes, math.prod(mesh.shape[axis] for axis in axes))


def zigzag_order(length: int, shards: int) -> np.ndarray:
    """int32 [T]: which token of a sequence lies at each place."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    return np.stack([chunks[:shards], chunks[shards:][::-1]], 1).reshape(-1)


def indices(shard: Array, length: int, shards: int, zigzag: bool) -> Array:
    """int32 [T / n]: which tokens of a sequence of T lie on a shard (int32 [])."""
    if not zigzag:
        return shard * (length // shards) + jnp.arange(length // shards, dtype=jnp.int32)
    chunk = length // (2 * shards)
    within = jnp.arange(chunk, dtype=jnp.int32)
    return jnp.concatenate([shard * chunk + within, (2 * shards - 1 - shard) * chunk + within])


def to_zigzag(x: Array, *axes: str | None) -> Array:
    """`x` in its own order -> in zigzag order along `length`; itself where sequences are whole.

    Each shard sends its two chunks, one device each; nothing is gathered.

    Args:
        axes: logical name of each dimension of x, `length` among them; 2n divides its size.
    """
    lies = split()
    if lies.shards == 1:
        return x
    dimension, shards = axes.index("length"), lies.shards
    chunks = range(2 * shards)
    holder = [min(chunk, 2 * shards - 1 - chunk) for chunk in chunks]
    even, odd = ([(chunk // 2, holder[chunk]) for chunk in chunks[first::2]] for first in (0, 1))

    def exchange(mine: Array) -> Array:
        first, second = jnp.split(mine, 2, dimension)
        first, second = jax.lax.ppermute(first, lies.axes, even), jax.lax.ppermute(second, lies.axes, odd)
        # of chunks i and 2n-1-i one is even: the first where i is
        both = jnp.stack([jnp.concatenate(pair, dimension) for pair in ((first, second), (second, first))])
        return both[jax.lax.axis_index(lies.axes) % 2]

    spec = nn.logical_to_mesh_axes(axes)
    return jax.shard_map(exchange, in_specs=spec, out_specs=spec, check_vma=False)(x)


def arranger(zigzag: bool, rows: str = "batch") -> Callable[[Array], Array] | None:
    """What brings an array [B, T, ...] out of the sequence's own order into that in which it lies; None: nothing does.

    Args:
        rows: logical name of its rows.
    """
    return (lambda x: to_zigzag(x, rows, "length", *(None,) * (x.ndim - 2))) if zigzag else None


def gathered(x: Array, lies: Split, zigzag: bool) -> Array:
    """Inside a `shard_map`: a device's part [B, T/n, ...] -> the whole [B, T, ...] in its own order."""
    if lies.shards == 1:
        return x
    whole = jax.lax.all_gather(x, lies.axes, axis=1, tiled=True)
    if not zigzag:
        return whole
    halves = whole.reshape(whole.shape[0], lies.shards, 2, -1, *whole.shape[2:])
    return jnp.concatenate([halves[:, :, 0], halves[:, ::-1, 1]], 1).reshape(whole.shape)
