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
from bertgpt_jax.corpus.view import Corpus
from bertgpt_jax.models import make_model
from bertgpt_jax.parallel import sharding
from bertgpt_jax.shapes import PyTree
from bertgpt_jax.training.run_config import RunConfig, StageConfig
from bertgpt_jax.training.step import eval_step, init_state, train_step


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage with its place among the global steps and its data.

    Attributes:
        config: measured in steps.
        start, stop: its steps are start..stop-1 of the run.
        train, held_out: its batches.
    """

    config: StageConfig
    start: int
    stop: int
    train: Dataset
    held_out: Dataset


@dataclasses.dataclass(frozen=True)
class Program:
    """A model with its objective on a mesh: abstract state and where it lies.

    Attributes:
        model: Linen module.
        objective: config object with the loss.
        abstract_state: `ShapeDtypeStruct`s with shardings, as a restore wants them.
        init: () -> fresh sharded state.
    """

    config: RunConfig
    mesh: Mesh
    model: Any
    abstract_state: PyTree
    init: Callable[[], PyTree]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state["params"]))

    def abstract_batch(self, stage: StageConfig) -> PyTree:
        """Shapes, dtypes and shardings of a stage's batches."""
        batch = self.config.objective.abstract_batch(stage.batch_size, stage.sequence_length)
        lies = sharding.batch_sharding(self.mesh)
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies) for name, x in batch.items()}


def make_datasets(
    config: RunConfig, corpus: Corpus, cache_dir: Path, debug: bool = False
) -> list[tuple[Dataset, Dataset]]:
    """(train, held-out) datasets of every stage; each with a seed of its own, lest it repeat the first."""

    def make(index: int, split: str) -> Dataset:
        stage = config.stages[index]
        return Dataset(
            corpus,
            config.objective.examples,
            config.objective.masking,
            split=split,
            sequence_length=stage.sequence_length,
            batch_size=stage.batch_size,
            seed=config.seed + (index << 32),
            cache_dir=cache_dir,
            debug=debug,
        )

    return [(make(i, "train"), make(i, "held_out")) for i in range(len(config.stages))]


def make_stages(config: RunConfig, datasets: list[tuple[Dataset, Dataset]]) -> list[Stage]:
    """Lays the stages of a config (measured in steps) one after another."""
    stages, start = [], 0
    for stage, (train, held_out) in zip(config.stages, datasets, strict=True):
        stages.append(Stage(stage, start, start + stage.steps, train, held_out))
        start += stage.steps
    return stages


def make_program(config: RunConfig, mesh: Mesh) -> Program:
    """The model of a config (vocabulary known) laid out on a mesh; allocates nothing.

    Raises:
        ConfigError: a parameter dimension or a batch that the mesh does not divide.
    """
    for stage in config.stages:
        sharding.check_batch(stage.batch_size, stage.microbatches, mesh, f"stages.{stage.name}")
    model = make_model(config.model, config.execution.compute)
    first = config.stages[0]
    rows = config.objective.abstract_batch(1, first.sequence_length)

    def init_params() -> PyTree:
        batch = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rows)
        return model.init(jax.random.key(config.seed), *config.objective.model_inputs(batch))["params"]

    def init() -> PyTree:
        return init_state(sharding.unboxed(init_params()), first.optimizer.build())

    where = sharding.parameter_shardings(jax.eval_shape(init_params), mesh)
    abstract = jax.eval_shape(init)
    lies = sharding.state_shardings(abstract, where, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, lies)
    return Program(config, mesh, model, abstract, lambda: sharding.sharded_init(init, lies))


def stage_state(program: Program, stage: StageConfig) -> PyTree:
    """The abstract state in a stage: its optimizer's, where that differs from the first stage's."""
    abstract = program.abstract_state
    params = jax.tree.map(lambda x: x.sharding, abstract["params"])
    mine = jax.eval_shape(lambda p: init_state(p, stage.optimizer.build()), abstract["params"])
    lies = sharding.state_shardings(mine, params, program.mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), mine, lies)


def lower_train_step(program: Program, stage: StageConfig) -> Any:
    """The stage's donated train step, traced for its shapes: `.compile()` gives (state, batch) -> (state, metrics)."""
    state = stage_state(program, stage)
    lies = jax.tree.map(lambda x: x.sharding, state)
    step = partial(
        train_step,
        model=program.model,
        objective=program.config.objective,
        optimizer=stage.optimizer,
        schedule=stage.schedule,
        microbatches=stage.microbatches,
        seed=program.config.seed,
    )
    replicated = NamedSharding(program.mesh, PartitionSpec())
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(lies, replicated))
    with sharding.mesh_context(program.mesh):
        return jitted.lower(state, program.abstract_batch(stage))


def lower_eval_step(program: Program, stage: StageConfig) -> Any:
    """The stage's evaluation step, traced: `.compile()` gives (params, batch) -> (sums, metric sums, weights)."""
    step = partial(eval_step, model=program.model, objective=program.config.objective)
    replicated = NamedSharding(program.mesh, PartitionSpec())
    with sharding.mesh_context(program.mesh):
        jitted = jax.jit(step, out_shardings=replicated)
        return jitted.lower(program.abstract_state["params"], program.abstract_batch(stage))


def enter_stage(program: Program, stage: StageConfig, state: PyTree) -> PyTree:
    """The state with which a stage begins: schedules start anew, moments too if it says so."""
    lies = jax.tree.map(lambda x: x.sharding, stage_state(program, stage))

    def enter(state: PyTree) -> PyTree:
        fresh = init_state(state["params"], stage.optimizer.build())
        moments = fresh["optimizer"] if stage.reset_optimizer else state["optimizer"]
        return state | {"optimizer": moments, "extras": fresh["extras"]}

    return jax.jit(enter, out_shardings=lies, donate_argnums=() if stage.reset_optimizer else 0)(state)
