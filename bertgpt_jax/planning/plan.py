"""A plan: what a run needs and how long it takes on a place, stage by stage and along their ramps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding

from bertgpt_jax.config import build
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.parallel import context
from bertgpt_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from bertgpt_jax.parallel.sharding import axis_size
from bertgpt_jax.planning.compiled import Compiled, compile_step
from bertgpt_jax.planning.memory import Memory, given_bytes, memory
from bertgpt_jax.planning.places import Place
from bertgpt_jax.planning.roofline import StepTime, sent_bytes, step_time
from bertgpt_jax.planning.work import Shards, Work, work_of
from bertgpt_jax.shapes import PyTree
from bertgpt_jax.training.ahead import ASSUMED_ROWS, assume_vocabulary
from bertgpt_jax.training.run_config import RunConfig, StageConfig, with_changes, with_steps
from bertgpt_jax.training.setup import (
    Program,
    check_batches,
    make_program,
    padded_shape,
    stage_state,
    state_shardings,
)

DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Shape:
    """Batches of one shape of a stage's ramp.

    Attributes:
        first, steps: number of the first of them in the stage, and how many there are.
        rows: of the batch; `computed` with those that fill it up.
        parts: microbatches.
        seconds: predicted, of one step.
    """

    first: int
    steps: int
    rows: int
    computed: int
    length: int
    parts: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage on a place.

    Attributes:
        work: of its full batch.
        model: bytes by the analytic model.
        compiled: what XLA says; None if nothing was compiled.
        time: of a step with the full batch.
        flops_per_token: training FLOPs a token, causal attention halved and in full.
        shapes: of its batches, in order.
    """

    name: str
    work: Work
    model: Memory
    compiled: Compiled | None
    time: StepTime
    flops_per_token: tuple[float, float]
    shapes: tuple[Shape, ...]

    @property
    def bytes_per_device(self) -> int:
        """As compiled, or else by the model."""
        return self.compiled.needed if self.compiled else self.model.total

    @property
    def days(self) -> float:
        """Of all its steps."""
        return sum(shape.steps * shape.seconds for shape in self.shapes) / DAY


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a place.

    Attributes:
        sizes: mesh axis to size.
        parameters: of the model.
        stages: in order.
        notes: what was assumed or changed, a line each.
        price: of a chip for an hour, None if not given.
    """

    place: Place
    sizes: Mapping[str, int]
    parameters: int
    config: RunConfig
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...]
    price: float | None = None

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return all(fits(stage, self.place) for stage in self.stages)

    @property
    def main(self) -> StagePlan:
        """The stage that takes most of the time; one that does not fit before all others."""
        return max(self.stages, key=lambda stage: (not fits(stage, self.place), stage.days))

    @property
    def days(self) -> float:
        """Of the whole run."""
        return sum(stage.days for stage in self.stages)

    @property
    def cost(self) -> float | None:
        """Of the whole run, in the price's currency."""
        return None if self.price is None else self.days * 24 * self.place.chips * self.price


def fits(stage: StagePlan, place: Place) -> bool:
    """Whether a stage's step has room."""
    return stage.compiled.fits if stage.compiled else stage.model.total <= place.chip.usable_bytes


def mfu(stage: StagePlan, place: Place, *, halved: bool) -> float:
    """Predicted share of the peak that the model's own FLOPs come to, by either convention of counting attention."""
    flops = stage.flops_per_token[0 if halved else 1] * stage.work.positions
    return flops / stage.time.total / (place.chips * place.chip.flops)


# ---------------------------------------------------------------- from a config


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A config as it would run on a place, and what is known of it without compiling.

    Attributes:
        program: laid out on one CPU device; its shardings name the axes, whatever their sizes.
    """

    config: RunConfig
    place: Place
    sizes: Mapping[str, int]
    program: Program
    notes: tuple[str, ...]

    @property
    def shards(self) -> Shards:
        """The mesh."""
        return Shards.of(self.sizes)


def parse_mesh(text: str) -> MeshConfig:
    """`fsdp=256,tensor=4` as a mesh: axes that are not named are 1, `data` takes what is left.

    Raises:
        ConfigError: no such axis, or no size.
    """
    items = [item.partition("=")[::2] for item in text.split(",") if item]
    parts = dict(items)
    if not parts.keys() <= set(AXES) or not parts or len(parts) < len(items):
        raise ConfigError(f"--mesh '{text}': axes are {', '.join(AXES)}, each once, as in fsdp=256,tensor=4")
    return build(MeshConfig, parts, "--mesh")


def prepare(config: RunConfig, place: Place, mesh: MeshConfig | None = None) -> Prepared:
    """What is needed to plan: vocabulary and steps known, mesh resolved, batches that it divides.

    Raises:
        ConfigError: a mesh that does not fit the place or the model.
    """
    notes = [] if config.model.vocab_size else ["the vocabulary is taken as large as the tokenizer's config allows"]
    if any(stage.epochs for stage in config.stages):
        notes.append(f"epochs are taken to have {ASSUMED_ROWS:,} rows; days follow from that")
    if mesh is not None:
        given = {name: getattr(mesh, name) for name in AXES}
        config = with_execution(config, {"mesh": config.execution.mesh.model_dump(mode="json") | given})
    config = assume_vocabulary(config)
    sizes = config.execution.mesh.resolve(place.chips)
    config.execution.mesh.across_slices(place.slices, sizes)
    config, more = _rounded(config, Shards.of(sizes))
    config = with_steps(config, [lambda length: ASSUMED_ROWS] * len(config.stages))
    _check(config, sizes)
    return Prepared(config, place, sizes, _on_one_device(config, place), (*notes, *more))


def _check(config: RunConfig, sizes: Mapping[str, int]) -> None:
    """ConfigError for what the trainer would refuse on a mesh of these sizes: rows, layers by stages, sequences."""
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    check_batches(config, mesh)
    zigzag = context.in_zigzag(config.execution.compute.zigzag, config.objective.kind == "causal_lm", mesh)
    for stage in config.stages:
        for segment in stage.ramp().segments:
            context.check_length(segment.sequence_length, zigzag, mesh, f"stages.{stage.name}.sequence_length")


def with_execution(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The config with other settings of its execution."""
    return with_changes(config, {"execution": config.execution.model_dump(mode="json") | changes})


def _rounded(config: RunConfig, shards: Shards) -> tuple[RunConfig, list[str]]:
    """Full batches and microbatches as the mesh divides them; a ramp's batches are filled up as the run goes."""
    stages, notes = [], []
    for stage in config.stages:
        tree = stage.model_dump(mode="json")
        size = -(-stage.batch_size // shards.batch) * shards.batch
        if size != stage.batch_size:
            notes.append(f"stage {stage.name}: batch of {stage.batch_size:,} rows rounded up; set batch_size={size}")
            ramp = tree["batch_ramp"]
            tree |= {"batch_size": size, "batch_ramp": [*ramp[:-1], [ramp[-1][0], size]] if ramp else []}
        each = size // shards.batch
        parts = next(k for k in range(min(stage.microbatches, each), each + 1) if each % k == 0)
        if parts != stage.microbatches:
            notes.append(
                f"stage {stage.name}: a device's {each} rows need another number of parts; set microbatches={parts}"
            )
            tree["microbatches"] = parts
        stages.append(tree)
        odd = sorted({n for _, n in stage.batch_ramp[:-1] if n % shards.batch})
        if odd:
            filled = ", ".join(f"{n:,} to {-(-n // shards.batch) * shards.batch:,}" for n in odd)
            notes.append(f"stage {stage.name}: batches of its ramp are filled up with rows of weight 0: {filled}")
    return with_changes(config, {"stages": stages}), notes


def _on_one_device(config: RunConfig, place: Place) -> Program:
    compute = config.execution.compute.model_dump(mode="json") | {"platform": place.chip.platform}
    mesh = MeshConfig(axes=config.execution.mesh.axes)
    whole = {"mesh": mesh.model_dump(mode="json"), "compute": compute, "shard_optimizer": False}
    alone = with_execution(config, whole)
    return make_program(alone, make_mesh(mesh, jax.devices("cpu")[:1]))


def make_plan(prepared: Prepared, *, compiling: bool = True, price: float | None = None) -> Plan:
    """The plan of a run, its stages compiled or by the analytic model alone.

    Raises:
        ConfigError: what would stop the run; a compiler that is not installed.
    """
    _check_heads(prepared.config, prepared.sizes)
    stages = tuple(_plan_stage(prepared, i, compiling) for i in range(len(prepared.config.stages)))
    p = prepared
    return Plan(p.place, dict(p.sizes), p.program.parameters, p.config, stages, p.notes, price)


def _check_heads(config: RunConfig, sizes: Mapping[str, int]) -> None:
    along, heads = dict(config.execution.mesh.logical_axes())["heads"], config.model.num_heads
    size = axis_size(AbstractMesh(tuple(sizes.values()), tuple(sizes)), along)
    if heads % size:
        able = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ConfigError(f"model.num_heads {heads} is not divisible by mesh {along} = {size}; use one of {able}")


def planned_state(prepared: Prepared, stage: StageConfig) -> PyTree:
    """The abstract state in a stage; its shardings name axes of the mesh that is planned for."""
    state = stage_state(prepared.program, stage)
    if not prepared.config.execution.shard_optimizer:
        return state
    mesh = AbstractMesh(tuple(prepared.sizes.values()), tuple(prepared.sizes))
    params = jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec), state["params"])
    lies = state_shardings(prepared.config, state, params, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, lies)


def model_memory(prepared: Prepared, stage: StageConfig, work: Work, shards: Shards) -> Memory:
    """Bytes of a stage's step by the analytic model."""
    state = planned_state(prepared, stage)
    return memory(work, shards, given_bytes(shards, state, prepared.program.abstract_batch(stage)))


def _plan_stage(prepared: Prepared, index: int, compiling: bool) -> StagePlan:
    config, place, shards = prepared.config, prepared.place, prepared.shards
    stage = config.stages[index]
    work = work_of(config, stage, place.chip.platform, shards.context)
    found = model_memory(prepared, stage, work, shards)
    compiled = compile_step(config, place, index) if compiling else None
    parameters = prepared.program.parameters
    sent = compiled.sent() if compiled and compiled.collectives else None
    scored = config.objective.scored_share(stage.sequence_length)
    flops = tuple(config.model.flops_per_token(stage.sequence_length, scored, halved=h) for h in (True, False))
    return StagePlan(
        name=stage.name,
        work=work,
        model=found,
        compiled=compiled,
        time=step_time(work, shards, place, parameters, sent),
        flops_per_token=flops,
        shapes=tuple(_shapes(stage, work, shards, place, parameters, sent)),
    )


def _shapes(stage: StageConfig, work: Work, shards: Shards, place: Place, parameters: int, sent: Any) -> list[Shape]:
    """The stage's ramp with a predicted time for each shape of batch."""
    segments, shapes = stage.ramp().segments, []
    analytic = sent_bytes(work, shards, parameters)
    most = work.positions // work.microbatches
    for segment, following in zip(segments, [*segments[1:], None], strict=True):
        last = following.first if following else stage.steps
        steps = min(last, stage.steps) - segment.first
        if steps <= 0:
            continue
        rows, parts = padded_shape(segment.batch_size, segment.sequence_length, shards.batch, most)
        if (rows, segment.sequence_length) == (work.rows, work.length):
            parts = work.microbatches
        this = dataclasses.replace(work, rows=rows, length=segment.sequence_length, microbatches=parts)
        scaled = sent_bytes(this, shards, parameters)
        if sent is not None:
            between = {"dcn": sent["dcn"]} if "dcn" in sent else {}  # gradients, whatever the rows
            scaled = {a: sent.get(a, 0.0) * (scaled[a] / analytic[a] if analytic[a] else 1.0) for a in scaled} | between
        seconds = step_time(this, shards, place, parameters, scaled).total
        shapes.append(Shape(segment.first, steps, segment.batch_size, rows, segment.sequence_length, parts, seconds))
    return shapes
