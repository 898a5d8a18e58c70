"""Everything between a config and the first step: what is trained, where it lies on the mesh, compiled steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.mixture import Mixture
from bertgpt_jax.batches.ramp import Ramped, Segment
from bertgpt_jax.config import build
from bertgpt_jax.corpus.mixture import CorpusMixture
from bertgpt_jax.corpus.view import Corpus
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.models import make_model
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.pipeline import Pipeline
from bertgpt_jax.objectives.base import Objective
from bertgpt_jax.parallel import context, pipeline, replicas, sharding
from bertgpt_jax.shapes import PyTree
from bertgpt_jax.training.data import make_held_out, make_train
from bertgpt_jax.training.hardware import check_fp8, warn_fp8
from bertgpt_jax.training.paths import check_paths
from bertgpt_jax.training.run_config import RunConfig, StageConfig, stage_steps
from bertgpt_jax.training.step import eval_step, init_state, train_step


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage with its place among the global steps and its data.

    Attributes:
        config: measured in steps.
        start, stop: its steps are start..stop-1 of the run.
        train: its batches, numbered from 0.
        held_out: what it is evaluated on.
    """

    config: StageConfig
    start: int
    stop: int
    train: Ramped
    held_out: Dataset | Mixture

    def segment(self, step: int) -> Segment:
        """What has the shape of the batch that step `step` of the run draws."""
        return self.train.ramp.segment(step - self.start)


@dataclasses.dataclass(frozen=True)
class Program:
    """A model with its objective on a mesh: abstract state and where it lies.

    Attributes:
        model: Linen module.
        objective: config object with the loss.
        abstract_state: `ShapeDtypeStruct`s with shardings, as a restore wants them.
        drawing: jitted () -> fresh sharded state.
    """

    config: RunConfig
    mesh: Mesh
    model: Any
    abstract_state: PyTree
    drawing: Any

    def init(self) -> PyTree:
        """A fresh state."""
        return self.drawing()

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state["params"]))

    def abstract_batch(self, stage: StageConfig) -> PyTree:
        """Shapes, dtypes and shardings of a stage's batches."""
        batch = self.config.objective.abstract_batch(stage.batch_size, stage.sequence_length)

        def lies(shape: tuple[int, ...]) -> NamedSharding:
            return sharding.array_sharding(self.mesh, shape, stage.sequence_length)

        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies(x.shape)) for name, x in batch.items()}


def make_datasets(
    config: RunConfig, corpus: Corpus | CorpusMixture, cache_dir: Path, debug: bool = False
) -> list[tuple[Ramped, Dataset | Mixture]]:
    """(train, held-out) batches of every stage."""
    pairs, start = [], 0
    for index, stage in enumerate(config.stages):
        train = make_train(config, index, start, corpus, cache_dir, debug)
        pairs.append((train, make_held_out(config, index, corpus, cache_dir, debug)))
        start += stage_steps(stage, train.rows_per_epoch)
    return pairs


def make_stages(config: RunConfig, datasets: list[tuple[Ramped, Dataset | Mixture]]) -> list[Stage]:
    """Lays the stages of a config (measured in steps) one after another."""
    stages, start = [], 0
    for stage, (train, held_out) in zip(config.stages, datasets, strict=True):
        stages.append(Stage(stage, start, start + stage.steps, train, held_out))
        start += stage.steps
    return stages


def check_batches(config: RunConfig, mesh: Mesh) -> None:
    """ConfigError where the rows of a stage's full batch do not divide over the mesh and its microbatches.

    The smaller ones of a ramp are filled up with rows of weight 0 (`shape_config`).
    """
    stages, exact = pipeline_on(config, mesh), config.execution.pipeline.microbatches is not None
    for stage in config.stages:
        sharding.check_batch(stage.batch_size, stage.microbatches, mesh, f"stages.{stage.name}")
        part = "batch_size" + (f" / {stage.microbatches} microbatches" if stage.microbatches > 1 else "")
        pipeline.check_rows(stage.batch_size // stage.microbatches, stages, exact, f"stages.{stage.name}: {part}")


def pipeline_on(config: RunConfig, mesh: Mesh) -> Pipeline | None:
    """The pipeline of the model on a mesh; None where all layers are in one place."""
    return pipeline.make_pipeline(config.execution.pipeline, config.model.num_layers, mesh)


def shape_config(program: Program, stage: StageConfig, segment: Segment) -> StageConfig:
    """The config of a stage with the batch shape of one segment of its ramp.

    Rows that the mesh does not divide are filled up. Microbatches are as few as divide the rows of every device and
    have no more positions than the stage's own.
    """
    length, shards = segment.sequence_length, sharding.batch_shards(program.mesh)
    most = stage.batch_size * stage.sequence_length // stage.microbatches
    size, fitting = padded_shape(segment.batch_size, length, shards, most)
    if (size, length) == (stage.batch_size, stage.sequence_length):
        fitting = stage.microbatches
    shape = {"batch_size": size, "sequence_length": length, "microbatches": fitting}
    return build(StageConfig, stage.model_dump(mode="json") | shape | {"batch_ramp": (), "length_ramp": ()}, "ramp")


def padded_shape(rows: int, length: int, shards: int, most: int) -> tuple[int, int]:
    """(rows that `shards` divide, parts): the fewest parts that have no more than `most` positions, if any have."""
    size = -(-rows // shards) * shards
    parts = (k for k in range(1, size // shards + 1) if size % (shards * k) == 0)
    return size, next((k for k in parts if size // k * length <= most), size // shards)


def compute_on(config: RunConfig, mesh: Mesh) -> ComputeConfig:
    """How the model is computed on a mesh, which may be of devices that are not here (ahead-of-time compilation)."""
    compute = config.execution.compute
    settings = {
        "platform": compute.platform or sharding.platform(mesh),
        "zigzag": context.in_zigzag(compute.zigzag, config.objective.kind == "causal_lm", mesh),
    }
    return build(ComputeConfig, compute.model_dump() | settings, "compute")


def check_settings(config: RunConfig, mesh: Mesh) -> ComputeConfig:
    """`compute_on`, after everything that can be refused of a config on a mesh while no vocabulary is known.

    Raises:
        ConfigError: a batch that the mesh does not divide; a setting that needs other devices, shapes or masks.
    """
    check_batches(config, mesh)
    if config.dropout_prng == "philox" and mesh.size > 1:
        raise ConfigError(
            f"dropout_prng = 'philox' on {mesh.size} devices: jax's products of its rounds (mulhi) do not compile for "
            "several devices; use threefry, or rbg"
        )
    compute = compute_on(config, mesh)
    check_fp8(compute, mesh.devices.flat[0])
    stages, shards = pipeline_on(config, mesh), sharding.batch_shards(mesh)
    for stage in config.stages:
        most = stage.batch_size * stage.sequence_length // stage.microbatches
        for segment in stage.ramp().segments:
            length, name = segment.sequence_length, f"stages.{stage.name}: sequence_length"
            context.check_length(length, compute.zigzag, mesh, name)
            size, parts = padded_shape(segment.batch_size, length, shards, most)
            rows = size // parts
            rows //= (stages.microbatches(rows) if stages else 0) or 1
            check_paths(config, compute, mesh, rows, length)
    return compute


def make_program(config: RunConfig, mesh: Mesh, guessed: bool = False) -> Program:
    """The model of a config (vocabulary known) laid out on a mesh; allocates nothing.

    Args:
        guessed: the vocabulary is; nothing is warned of that depends on it.

    Raises:
        ConfigError: as `check_settings`; a parameter dimension that the mesh does not divide.
    """
    compute = check_settings(config, mesh)
    model = make_model(config.model, compute, pipeline_on(config, mesh))
    first = config.stages[0]
    rows = config.objective.abstract_batch(1, first.sequence_length)
    # What a kernel would prepare for a long sequence takes minutes, a copy of the program for every layer seconds, and
    # parameters depend on neither.
    scanned = {"attention": "reference", "unroll_layers": False, "remat": "none"}
    plain = make_model(config.model, build(ComputeConfig, compute.model_dump() | scanned, "compute"))

    def init_params() -> PyTree:
        batch = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rows)
        return plain.init(jax.random.key(config.seed), *config.objective.model_inputs(batch))["params"]

    def begin(params: PyTree) -> PyTree:
        return init_state(sharding.unboxed(params), first.optimizer.build())

    params = jax.eval_shape(init_params)
    where = sharding.parameter_shardings(params, mesh, config.execution.mesh.logical_axes())
    abstract = jax.eval_shape(begin, params)
    if not guessed:
        warn_fp8(compute, sum(leaf.size for leaf in jax.tree.leaves(abstract["params"])))
    lies = state_shardings(config, abstract, where, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, lies)
    return Program(config, mesh, model, abstract, jax.jit(lambda: begin(init_params()), out_shardings=lies))


def stage_state(program: Program, stage: StageConfig) -> PyTree:
    """The abstract state in a stage: its optimizer's, where that differs from the first stage's."""
    abstract = program.abstract_state
    if stage.optimizer.state_kind == program.config.stages[0].optimizer.state_kind:
        return abstract
    params = jax.tree.map(lambda x: x.sharding, abstract["params"])
    mine = jax.eval_shape(lambda p: init_state(p, stage.optimizer.build()), abstract["params"])
    lies = state_shardings(program.config, mine, params, program.mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), mine, lies)


def state_shardings(config: RunConfig, abstract: PyTree, params: PyTree, mesh: Mesh) -> PyTree:
    """Where a state lies whose parameters lie as `params`: optimizer states as they do, or divided among replicas."""
    lies, divided = sharding.state_shardings(abstract, params, mesh), _divided(config, abstract["params"], params, mesh)
    if divided is None:
        return lies
    return lies | {"optimizer": sharding.state_shardings(abstract, divided, mesh)["optimizer"]}


def _divided(config: RunConfig, abstract_params: PyTree, params: PyTree, mesh: Mesh) -> PyTree | None:
    """Shardings of parameters while replicas divide the update among them; None if they do not."""
    return replicas.spread(abstract_params, params, mesh) if config.execution.shard_optimizer else None


def lower_train_step(program: Program, stage: StageConfig, objective: Objective | None = None) -> Any:
    """The stage's donated train step, traced for its shapes: `.compile()` gives (state, batch) -> (state, metrics).

    Args:
        objective: in place of the run's, for comparisons.
    """
    state = stage_state(program, stage)
    lies = jax.tree.map(lambda x: x.sharding, state)
    step = partial(
        train_step,
        model=program.model,
        objective=objective or program.config.objective,
        optimizer=stage.optimizer,
        schedule=stage.schedule,
        microbatches=stage.microbatches,
        seed=program.config.seed,
        prng=program.config.dropout_prng,
        divided=_divided(program.config, state["params"], lies["params"], program.mesh),
    )
    replicated = NamedSharding(program.mesh, PartitionSpec())
    jitted = jax.jit(_arranging(step, program), donate_argnums=0, out_shardings=(lies, replicated))
    with sharding.mesh_context(program.mesh, program.config.execution.mesh.logical_axes()):
        return jitted.lower(state, program.abstract_batch(stage))


def lower_eval_step(program: Program, stage: StageConfig) -> Any:
    """The stage's evaluation step, traced: `.compile()` gives (params, batch) -> (sums, metric sums, weights)."""
    step = partial(eval_step, model=program.model, objective=program.config.objective)
    replicated = NamedSharding(program.mesh, PartitionSpec())
    with sharding.mesh_context(program.mesh, program.config.execution.mesh.logical_axes()):
        jitted = jax.jit(_arranging(step, program), out_shardings=replicated)
        return jitted.lower(program.abstract_state["params"], program.abstract_batch(stage))


def _arranging(step: Callable, program: Program) -> Callable:
    """`step`, sequences of its batches first brought into the order in which the model expects them on its mesh."""

    def arranged_step(tree: PyTree, batch: PyTree) -> Any:
        return step(tree, context.arranged(batch, program.model.compute.zigzag))

    return arranged_step


def enter_stage(program: Program, stage: StageConfig, state: PyTree) -> PyTree:
    """The state with which a stage begins: schedules start anew, moments too if it says so."""
    lies = jax.tree.map(lambda x: x.sharding, stage_state(program, stage))

    def enter(state: PyTree) -> PyTree:
        fresh = init_state(state["params"], stage.optimizer.build())
        moments = fresh["optimizer"] if stage.reset_optimizer else state["optimizer"]
        return state | {"optimizer": moments, "extras": fresh["extras"]}

    return jax.jit(enter, out_shardings=lies, donate_argnums=() if stage.reset_optimizer else 0)(state)
