"""Replicas of the parameters: what each computes alone and is summed once, and what they divide among themselves.

ZeRO stage 1 (Rajbhandari et al. 2020, section 5): every replica holds the parameters, and its part of the optimizer's
state. Gradients are summed straight into parts (reduce-scatter), each replica updates its part of the parameters, and
the new parameters are gathered once. Told by sharding constraints alone, XLA for TPUs (libtpu 0.0.42) sums the gradient
of an embedding whole: it has no reduce-scatter over more than one dimension of the torus. So it is told in full here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn.random import SPLIT_ROWS
from bertgpt_jax.parallel.sharding import axis_size
from bertgpt_jax.shapes import PyTree

REPLICAS = "data"
"""The mesh axis along which parameters repeat."""

SUBLANES = 8
"""Rows of a TPU's vector register: what is left of a dimension should be a multiple of it."""

SMALL = 2**16
"""Elements below which a parameter stays whole: a collective of its own would cost more than its bytes."""


def spread(abstract_params: PyTree, shardings: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of what the replicas divide: gradients, optimizer state, updates.

    One more dimension of each parameter is split, over the replicas. A small parameter, or one without a dimension that
    they divide, stays whole.

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
            f"execution.shard_optimizer: no parameter of {SMALL:,} numbers or more has a dimension that "
            f"mesh.{REPLICAS} = {count} divides; set it to false, or use another mesh"
        )
    return found


def _split(shape: tuple[int, ...], lies: NamedSharding, count: int, mesh: Mesh) -> NamedSharding:
    entries = [*lies.spec, *(None,) * (len(shape) - len(lies.spec))]
    sizes = [length // axis_size(mesh, entry) for length, entry in zip(shape, entries, strict=True)]
    able = [i for i, size in enumerate(sizes) if size % count == 0] if math.prod(shape) >= SMALL else []
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
    places = jax.tree.map(lambda _: -1, grad_shapes) if lies is None else jax.tree.map(_own_dimension, lies)

    links = Links(()) if lies is None else _links(jax.tree.leaves(lies)[0].mesh)

    def reduce(grad: Any, dimension: int) -> Any:
        return jax.lax.psum(grad, REPLICAS) if dimension < 0 else _scattered(grad, dimension, links)

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


def _own_dimension(lies: NamedSharding) -> int:
    """The dimension that the replicas alone divide; -1 where there is none."""
    return next((i for i, entry in enumerate(lies.spec) if entry in (REPLICAS, (REPLICAS,))), -1)


class Links(NamedTuple):
    """How replicas are joined.

    Attributes:
        sides: their number, factored into slices (over the slow network), if there are several, and the sides of a
            torus; the last side's neighbours are the next in number.
        slices: whether the first is slices.
    """

    sides: tuple[int, ...]
    slices: bool = False


def _links(mesh: Mesh) -> Links:
    """The torus of the replicas, as the devices' coordinates tell; where they tell nothing, all are one side."""
    axis = mesh.axis_names.index(REPLICAS)
    line = np.moveaxis(mesh.devices, axis, 0).reshape(mesh.devices.shape[axis], -1)[:, 0]
    places = np.array([(getattr(d, "slice_index", 0) or 0, *(getattr(d, "coords", None) or ())) for d in line])
    moving = [i for i in range(places.shape[1]) if len(set(places[:, i])) > 1]
    moving.sort(key=lambda i: (i != 0, -int(np.argmax(places[:, i] != places[0, i]))))  # slices, then slowest first
    sides = tuple(len(set(places[:, i])) for i in moving)
    if math.prod(sides) != len(line):
        return Links((len(line),))
    return Links(sides, 0 in moving)


def _scattered(x: Any, dimension: int, links: Links) -> Any:
    """The sum of x over replicas, of which each gets its part of `dimension`: a side at a time, slices last.

    XLA for TPUs reduces and scatters along one side of the torus, and over several at once sums everything everywhere.
    """
    sides, order = links.sides, [*range(len(links.sides))]
    rest = (*x.shape[:dimension], *x.shape[dimension + 1 :])
    x = jnp.moveaxis(x, dimension, 0).reshape(x.shape[dimension], -1)
    if links.slices:  # last, as what crosses the slow network is then the smallest
        order = [*order[1:], 0]
        x = x.reshape(sides[0], math.prod(sides[1:]), -1, x.shape[1]).swapaxes(0, 1).reshape(x.shape)
    numbers = np.arange(math.prod(sides)).reshape(sides)
    for side in order:
        groups = np.moveaxis(numbers, side, -1).reshape(-1, sides[side]).tolist()
        if len(sides) > 1:  # rows in memory too: lanes of a register cannot be scattered, and XLA would sum everything
            x = with_layout_constraint(x, Layout((0, 1)))
        x = jax.lax.psum_scatter(x, REPLICAS, scatter_dimension=0, axis_index_groups=groups, tiled=True)
    return jnp.moveaxis(x.reshape(-1, *rest), 0, dimension)


def _rules_of_one() -> tuple[tuple[str, Any], ...]:
    """The logical axes in force, for one replica."""

    def rest(axes: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(name for name in names if name != REPLICAS) or None

    return (*((name, rest(axes)) for name, axes in nn.get_logical_axis_rules()), (SPLIT_ROWS, REPLICAS))
