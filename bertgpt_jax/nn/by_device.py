"""Attention that the compiler cannot split by itself, on each device's rows and heads alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from bertgpt_jax.shapes import Array, Heads

AXES = ("batch", None, "act_heads", None)
"""Logical axes of queries, keys and values whose sequences are whole."""


def on_each_device(attend: Callable, heads: tuple[Heads, Heads, Heads], *rows: Array | None) -> Heads:
    """`attend(*heads, *rows)`, under the mesh in force: queries, keys and values, then arrays of rows [B, ...]."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(*heads, *rows)
    spec = nn.logical_to_mesh_axes(AXES)
    # results of kernels carry no record of which mesh axes they vary over
    mapped = jax.shard_map(
        attend, in_specs=(spec,) * 3 + (PartitionSpec(spec[0]),) * len(rows), out_specs=spec, check_vma=False
    )
    return mapped(*heads, *rows)


def local_shape(q_shape: tuple[int, ...]) -> tuple[int, ...]:
    """(B, T, N, H) of one device's share; of those that differ, the largest."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tuple(q_shape)
    shards = []
    for axes in nn.logical_to_mesh_axes(AXES):
        names = (axes,) if isinstance(axes, str) else axes or ()
        shards.append(math.prod(mesh.shape[name] for name in names))
    return tuple(-(-size // count) for size, count in zip(q_shape, shards, strict=True))
