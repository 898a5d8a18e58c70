"""Whether what a config asks for of attention and of the vocabulary head can serve its batches, before it is traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bertgpt_jax.nn import sequence
from bertgpt_jax.nn.attention import AttentionCase, choose
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.linear_cross_entropy import check_chunk, fitting_chunks
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.parallel import sharding
from bertgpt_jax.training.run_config import RunConfig


def check_paths(config: RunConfig, compute: ComputeConfig, mesh: Mesh, rows: int, length: int) -> None:
    """Chooses attention as a train step of this shape will, for the masks of the run's objective; says what it is.

    Args:
        compute: how the model is computed on `mesh`.
        rows: that go through a layer together.

    Raises:
        ConfigError: the wanted path cannot serve, or `head_chunk` does not divide the scored positions of a row.
    """
    model, objective = config.model, config.objective
    if sharding.platform(mesh) != compute.compiled_for():
        return  # devices that stand for others: what they can do is known where the program is traced for those
    inputs = jax.eval_shape(objective.model_inputs, objective.abstract_batch(rows, length))
    mask = next(part for part in inputs if isinstance(part, AttentionMask))
    shape, dropping = (rows, length, model.num_heads, model.head_size), model.attention_dropout > 0
    with sharding.mesh_context(mesh, config.execution.mesh.logical_axes()):
        shards = sequence.split().shards
        case = AttentionCase(shape, length, jnp.dtype(compute.dtype), mask, dropping, shards)
        choose(compute.attention_choice(), case)
        if compute.head_chunk is not None:
            check_chunk(compute.head_chunk, scored_positions(config, length))


def scored_positions(config: RunConfig, length: int) -> int:
    """Positions of a row of `length` tokens that reach the vocabulary head."""
    return round(config.objective.scored_share(length) * length)


def head_chunks(config: RunConfig, mesh: Mesh) -> list[int]:
    """What `execution.compute.head_chunk` may be for all stages, ascending."""
    lengths = {segment.sequence_length for stage in config.stages for segment in stage.ramp().segments}
    scored = {scored_positions(config, length) for length in lengths}
    with sharding.mesh_context(mesh, config.execution.mesh.logical_axes()):
        return sorted(set.intersection(*(set(fitting_chunks(count)) for count in scored)))
