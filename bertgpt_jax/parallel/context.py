"""Sequences split over the mesh axis `context`: what divides them, and bringing batches into the order in which causal
attention gives every device the same work."""

from __future__ import annotations

from jax.sharding import Mesh

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn.sequence import arranger
from bertgpt_jax.parallel.sharding import SEQUENCE
from bertgpt_jax.shapes import Array


def shards(mesh: Mesh) -> int:
    """Number of parts that a sequence is split into."""
    return mesh.shape[SEQUENCE]


def in_zigzag(wanted: bool | None, causal: bool, mesh: Mesh) -> bool:
    """Whether sequences lie in zigzag order: causal ones that the mesh splits, unless it is not wanted.

    Args:
        wanted: `execution.compute.zigzag`.

    Raises:
        ConfigError: it is wanted for a model that looks both ways.
    """
    if wanted and not causal:
        raise ConfigError("execution.compute.zigzag = true: only causal models gain by it; leave it null")
    return causal and shards(mesh) > 1 and wanted is not False


def check_length(length: int, zigzag: bool, mesh: Mesh, name: str) -> None:
    """Raises ConfigError where a sequence does not divide over the mesh."""
    count = shards(mesh)
    step = 2 * count if zigzag else count
    if count > 1 and length % step:
        lower, upper = length // step * step, -(-length // step) * step
        rule = f"twice mesh.{SEQUENCE} (execution.compute.zigzag)" if zigzag else f"mesh.{SEQUENCE}"
        raise ConfigError(
            f"{name} {length} is not divisible by {rule} = {step}; use {f'{lower} or {upper}' if lower else upper}"
        )


def arranged(batch: dict[str, Array], zigzag: bool) -> dict[str, Array]:
    """The batch as its sequences lie on the mesh in force; each device sends its halves to one other each.

    What has no sequence dimension stays as it is: causal models are asked about places in rows by nobody else.
    """
    arrange, length = arranger(zigzag, "rows"), batch["tokens"].shape[1]
    if arrange is None:
        return batch
    along = {name for name, array in batch.items() if array.ndim > 1 and array.shape[1] == length}
    return {name: arrange(array) if name in along else array for name, array in batch.items()}
