"""From abstract trees to sharded arrays: nothing is ever allocated unsharded."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.parallel.axes import LOGICAL_AXES, Table
from bertgpt_jax.shapes import PyTree

ROWS = PartitionSpec(("pipe", "data", "fsdp"))
"""How every array of a batch is split: by rows, over stages, replicas and parameter shards alike."""

SEQUENCE = "context"
"""The mesh axis over which sequences are split."""


@contextmanager
def mesh_context(mesh: Mesh, table: Table = LOGICAL_AXES):
    """Inside, logical constraints of model code mean `mesh`; `jax.jit` must be traced in it.

    `jax.set_mesh`, not `with mesh:`, under which Linen drops every constraint without a word.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(table):
        yield


def path_name(path: tuple) -> str:
    """`layers/attention/query/kernel` for a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: PyTree) -> dict[str, Any]:
    """Path name -> leaf, in the tree's order; the names are the keys of checkpoints and exports."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {path_name(path): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves of the tree have one path"
    return flat


def unboxed(tree: PyTree) -> PyTree:
    """A parameter tree without the logical axes that `Module.init` boxes its leaves with."""
    return nn.unbox(tree)


def parameter_shardings(abstract_params: PyTree, mesh: Mesh, table: Table = LOGICAL_AXES) -> PyTree:
    """Shardings of a parameter tree whose leaves still carry their logical axes (`jax.eval_shape` of `Module.init`).

    Raises:
        ConfigError: naming the parameter, dimension and mesh axis where the axis does not divide the dimension.
    """
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract_params), mesh, table)
    names = flatten(nn.get_partition_spec(abstract_params))
    for name, leaf in flatten(nn.unbox(abstract_params)).items():
        spec = flatten(shardings)[name].spec
        for i, axes in enumerate(spec):
            size = axis_size(mesh, axes)
            if leaf.shape[i] % size:
                raise ConfigError(
                    f"parameter {name}: dimension '{names[name][i]}' of size {leaf.shape[i]} is not divisible by "
                    f"mesh {axes} = {size}; use a mesh that divides it, or size {-(-leaf.shape[i] // size) * size}"
                )
    return shardings


def axis_size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Number of shards that a partition-spec entry makes."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def state_shardings(abstract_state: PyTree, param_shardings: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of a training state: an array that mirrors a parameter lies as it does, all else is replicated.

    Optimizer states keep the parameter's path as the end of theirs; factored moments have other shapes, are small, and
    are replicated.
    """
    by_path = flatten(param_shardings)
    shapes = {name: leaf.shape for name, leaf in flatten(abstract_state["params"]).items()}
    replicated = NamedSharding(mesh, PartitionSpec())

    def choose(path: tuple, leaf: Any) -> NamedSharding:
        name = path_name(path)
        while name:
            if name in by_path and shapes[name] == leaf.shape:
                return by_path[name]
            name = name.partition("/")[2]
        return replicated

    return jax.tree_util.tree_map_with_path(choose, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of every array of a batch (leading dimension = rows)."""
    return NamedSharding(mesh, ROWS)


def array_sharding(mesh: Mesh, shape: tuple[int, ...], length: int) -> NamedSharding:
    """Sharding of one array of a batch of sequences of `length`: by rows, and along the sequence where it has one."""
    along = len(shape) > 1 and shape[1] == length and length % mesh.shape[SEQUENCE] == 0
    return NamedSharding(mesh, PartitionSpec(ROWS[0], SEQUENCE)) if along else batch_sharding(mesh)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Sorted row indices of a global batch that this process's devices hold.

    Read off the sharding, not off the process index: tensor and pipe axes may span processes.
    """
    rows: set[int] = set()
    for index in batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values():
        rows.update(range(*index[0].indices(batch_size)))
    return np.array(sorted(rows), np.int64)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Puts this process's rows (`local_rows`, in order) of a global batch onto its devices, sequences in parts.

    Args:
        batch: `tokens` [rows, T] among its arrays, sequences whole and in their own order.
    """
    mine, length = local_rows(mesh, batch_size), batch["tokens"].shape[1]

    def place(array: np.ndarray) -> jax.Array:
        shape = (batch_size, *array.shape[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first = np.searchsorted(mine, index[0].start or 0)
            rows = len(range(*index[0].indices(batch_size)))
            return array[(slice(first, first + rows), *index[1:])]

        return jax.make_array_from_callback(shape, array_sharding(mesh, shape, length), part)

    return {name: place(array) for name, array in batch.items()}


def platform(mesh: Mesh) -> str:
    """What the mesh's devices are: cpu, gpu or tpu."""
    name = mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that the rows of a batch are split into."""
    return axis_size(mesh, ROWS[0])


def padded_rows(batch_size: int, mesh: Mesh) -> int:
    """The smallest number of rows from `batch_size` on that the mesh divides."""
    shards = batch_shards(mesh)
    return -(-batch_size // shards) * shards


def check_batch(batch_size: int, microbatches: int, mesh: Mesh, name: str) -> None:
    """Raises ConfigError where rows do not divide over the mesh and the microbatches."""
    shards = batch_shards(mesh)
    if batch_size % (shards * microbatches):
        step = shards * microbatches
        lower, upper = batch_size // step * step, -(-batch_size // step) * step
        advice = f"{lower} or {upper}" if lower else f"{upper}"
        axes = "*".join(axis for axis in ROWS[0] if axis != "pipe" or mesh.shape[axis] > 1)
        raise ConfigError(
            f"{name}.batch_size {batch_size} is not divisible by {axes}*microbatches = {step}; use {advice}"
        )


def bytes_per_device(abstract: PyTree, shardings: PyTree) -> int:
    """Largest number of bytes that one device holds of a tree."""
    total = 0
    for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True):
        total += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total
