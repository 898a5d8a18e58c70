"""Pipeline stages on a mesh: what they divide, said before anything is compiled."""

from __future__ import annotations

from jax.sharding import Mesh

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn.pipeline import Pipeline, PipelineConfig
from bertgpt_jax.parallel.sharding import axis_size

STAGES = "pipe"
"""The mesh axis over which the layers are spread."""

PER_STAGE = 4
"""Microbatches for each stage if nobody says how many: with four, a stage is idle for less than a fifth of its time."""


def make_pipeline(config: PipelineConfig, num_layers: int, mesh: Mesh) -> Pipeline | None:
    """The pipeline of a model on a mesh; None where the mesh does not split the layers.

    Raises:
        ConfigError: layers that the stages do not divide, microbatches that are fewer than the stages or no multiple.
    """
    stages, repeats = mesh.shape[STAGES], config.groups
    if stages == 1:
        return None
    groups = stages * repeats
    if num_layers % groups:
        able = [n for n in range(repeats, num_layers + 1, repeats) if num_layers % n == 0]
        product = f"mesh.{STAGES}" + (f" * execution.pipeline.repeats = {stages} * {repeats}" if repeats > 1 else "")
        fits = ", ".join(str(n // repeats) for n in able)
        raise ConfigError(
            f"model.num_layers {num_layers} is not divisible by {product} = {groups}; "
            + (f"mesh.{STAGES} may be one of {fits}" if able else f"with repeats = {repeats} no mesh.{STAGES} does")
        )
    wanted = stages * PER_STAGE if config.microbatches is None else config.microbatches
    if wanted < stages:
        raise ConfigError(
            f"execution.pipeline.microbatches {wanted} are fewer than the {stages} stages of mesh.{STAGES}, which "
            f"would never all work; use {stages} or a multiple, or null"
        )
    if wanted % stages:
        lower, upper = wanted // stages * stages, -(-wanted // stages) * stages
        raise ConfigError(
            f"execution.pipeline.microbatches {wanted} is not a multiple of mesh.{STAGES} = {stages}; "
            f"use {lower} or {upper}, or null"
        )
    return Pipeline(stages, repeats, wanted, axis_size(mesh, ("data", "fsdp")), config.remat)


def check_rows(rows: int, pipeline: Pipeline | None, exact: bool, name: str) -> None:
    """Raises ConfigError where a batch does not divide into microbatches of a pipeline.

    Args:
        rows: of one part of the batch (`stages.X.microbatches`).
        exact: the number of microbatches was given, and holds.
    """
    if pipeline is None:
        return
    found = pipeline.microbatches(rows)
    if found and (found == pipeline.wanted or not exact):
        return
    step = pipeline.row_shards * (pipeline.wanted if exact else pipeline.stages)
    lower, upper = rows // step * step, -(-rows // step) * step
    counts = [n for n in range(pipeline.stages, rows + 1, pipeline.stages) if rows % (n * pipeline.row_shards) == 0]
    fits = f"; with {rows} rows, execution.pipeline.microbatches may be one of {counts}" if counts else ""
    what = "execution.pipeline.microbatches" if exact else f"mesh.{STAGES}"
    raise ConfigError(
        f"{name}: {rows} rows are not divisible by data*fsdp*{what} = {step}; "
        f"use {f'{lower} or {upper}' if lower else upper}{fits}"
    )
