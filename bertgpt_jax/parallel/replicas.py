"""Replicas of the parameters: what each computes alone and is summed once, and what they divide among themselves.

ZeRO stage 1 (Rajbhandari et al. 2020, section 5): every replica holds the parameters, and its part of the optimizer's
state. Gradients are summed straight into parts (reduce-scatter), each replica updates its part of the parameters, and
the new parameters are gathered once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn.random import SPLIT_ROWS
from bertgpt_jax.parallel.sharding import axis_size
from bertgpt_jax.shapes import PyTree

REPLICAS = "data"
"""The mesh axis along which parameters repeat."""

SUBLANES = 8
"""Rows of a TPU's vector register: what is left of a dimension should be a multiple of it."""


def spread(abstract_params: PyTree, shardings: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of what the replicas divide: gradients, optimizer state, updates.

    One more dimension of each parameter is split, over the replicas. A parameter without a dimension that they divide
    stays whole.

    Raises:
        ConfigError: there is one replica only, or no parameter can be split.
    """
    count = mesh.shape[REPLICAS]
    if count == 1:
        raise ConfigError(
            f"execution.shard_optimizer: mesh.{REPLICAS} = 1, there are no replicas to share the optimizer's state; "
            f"set it to false, or give the mesh replicas (mesh.{REPLICAS}=-1)"
        )
    found = jax.tree.map(lambda leaf, lies: _split(leaf.shape, lies, count, mesh), abstract_params, shardings)
    if found == shardings:
        raise ConfigError(
            f"execution.shard_optimizer: no parameter has a dimension that mesh.{REPLICAS} = {count} divides; "
            "set it to false, or use another mesh"
        )
    return found


def _split(shape: tuple[int, ...], lies: NamedSharding, count: int, mesh: Mesh) -> NamedSharding:
    entries = [*lies.spec, *(None,) * (len(shape) - len(lies.spec))]
    sizes = [length // axis_size(mesh, entry) for length, entry in zip(shape, entries, strict=True)]
    able = [i for i, size in enumerate(sizes) if size % count == 0]
    if not able:
        return lies

    def merit(i: int) -> tuple:
        whole, last = axis_size(mesh, entries[i]) == 1, i == len(shape) - 1
        stacked = i == 0 and len(shape) > 1 and entries[0] == "pipe"  # layer by layer, gradients come from a loop
        return whole and not stacked, sizes[i] // count % SUBLANES == 0, not last, sizes[i]

    best = max(able, key=merit)
    names = (entries[best],) if isinstance(entries[best], str) else entries[best] or ()
    entries[best] = (*(name for name in names if mesh.shape[name] > 1), REPLICAS)
    return NamedSharding(mesh, PartitionSpec(*entries))


def replicas() -> int:
    """Replicas of the mesh in force; 1 without one, and where each is already computed for itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or REPLICAS in mesh.manual_axes else mesh.shape[REPLICAS]


def sum_of_replicas(
    local: Callable[[Any, Any], tuple[PyTree, PyTree, PyTree]], whole: Any, rows: Any, lies: PyTree | None
) -> tuple[PyTree, PyTree, PyTree]:
    """`local(whole, rows)`, computed by every replica for its own rows; the results are summed once, at the end.

    Nothing inside is exchanged between replicas. Other mesh axes work as ever: parameters split over them are gathered
    and their gradients scattered inside.

    Args:
        local: (whole, rows) -> (gradients, sums, carry).
        whole: what every replica gets: parameters, keys.
        rows: arrays of the batch, and the carry: split by rows.
        lies: where gradients are to lie (`spread`); None: whole on every replica.

    Returns:
        (gradients, sums) summed over replicas, and the carry, split by rows.
    """
    if replicas() == 1:
        return local(whole, rows)
    grad_shapes, sum_shapes, carry_shapes = jax.eval_shape(local, whole, rows)
    lies = jax.tree.map(lambda _: None, grad_shapes) if lies is None else lies
    places = jax.tree.map(lambda shape, place: _own_dimension(place), grad_shapes, lies)

    def reduce(grad: Any, dimension: int) -> Any:
        if dimension < 0:
            return jax.lax.psum(grad, REPLICAS)
        return jax.lax.psum_scatter(grad, REPLICAS, scatter_dimension=dimension, tiled=True)

    def one(whole: Any, rows: Any) -> tuple[PyTree, PyTree, PyTree]:
        with nn.logical_axis_rules(_rules_of_one()):
            grads, sums, carry = local(whole, rows)
        return jax.tree.map(reduce, grads, places), jax.lax.psum(sums, REPLICAS), carry

    parts = jax.tree.map(lambda d: PartitionSpec(*(None,) * d, REPLICAS) if d >= 0 else PartitionSpec(), places)
    by_row = PartitionSpec(REPLICAS)
    out = (parts, jax.tree.map(lambda _: PartitionSpec(), sum_shapes), jax.tree.map(lambda _: by_row, carry_shapes))
    mapped = jax.shard_map(
        one, in_specs=(PartitionSpec(), by_row), out_specs=out, axis_names={REPLICAS}, check_vma=False
    )  # what kernels inside return carries no record of which mesh axes it varies over
    return mapped(whole, rows)


def _own_dimension(lies: NamedSharding | None) -> int:
    """The dimension that the replicas alone divide; -1 where there is none."""
    entries = () if lies is None else lies.spec
    return next((i for i, entry in enumerate(entries) if entry in (REPLICAS, (REPLICAS,))), -1)


def _rules_of_one() -> tuple[tuple[str, Any], ...]:
    """The logical axes in force, for one replica."""

    def rest(axes: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(name for name in names if name != REPLICAS) or None

    return (*((name, rest(axes)) for name, axes in nn.get_logical_axis_rules()), (SPLIT_ROWS, REPLICAS))
