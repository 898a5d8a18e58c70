"""Attention that the compiler cannot split by itself, on each device's rows and heads alone."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

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
    """(B, T, N, H) of one device's share."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tuple(q_shape)
    # axes that a `shard_map` around this one has taken are not in the spec, and shapes of shards cannot be asked for
    plain = AbstractMesh(mesh.axis_sizes, mesh.axis_names)
    return NamedSharding(plain, PartitionSpec(*nn.logical_to_mesh_axes(AXES))).shard_shape(tuple(q_shape))
