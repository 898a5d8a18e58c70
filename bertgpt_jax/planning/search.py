"""The fastest ways to run a config on a place: the analytic models rank all of them, the best few are compiled."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.parallel.mesh import AXES, MeshConfig
from bertgpt_jax.planning.memory import given_bytes, memory
from bertgpt_jax.planning.places import Place, torus_shapes
from bertgpt_jax.planning.plan import Plan, Prepared, fits, make_plan, prepare
from bertgpt_jax.planning.roofline import step_time
from bertgpt_jax.planning.work import Shards, Work, pipeline_parts, work_of
from bertgpt_jax.training.run_config import RunConfig, StageConfig, with_changes
from bertgpt_jax.training.setup import stage_state

REMAT = ("none", "gelu", "dots", "full")
MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
LARGEST_TENSOR = 16
"""More shards of a matrix than this leave each too narrow for the matrix unit in every model we ship."""
LARGEST_PIPE = 16
"""More stages wait for one another longer than sharding costs, on every torus we know."""
LONG = 8192
"""Sequences from here on may be split over the context axis."""
ROOM = 0.92
"""Share of the memory that the model may fill: it is within a tenth of what the compiler then says."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a stage, by the analytic models.

    Attributes:
        bytes_per_device, seconds: of a step.
    """

    shards: Shards
    remat: str
    microbatches: int
    bytes_per_device: int
    seconds: float

    def describe(self) -> str:
        """As settings."""
        mesh = ",".join(f"{axis}={size}" for axis, size in zip(AXES, self.shards, strict=True) if size > 1) or "data=1"
        return f"{mesh} remat={self.remat} microbatches={self.microbatches}"


def candidates(prepared: Prepared, stage: StageConfig) -> list[Candidate]:
    """Every way that fits by the model, fastest first; those as fast with less memory before others."""
    state = stage_state(prepared.program, stage)
    batch = prepared.program.abstract_batch(stage)
    base = work_of(prepared.config, stage, prepared.place.chip.platform)
    found, room = [], prepared.place.chip.usable_bytes * ROOM
    for shards in meshes(prepared.place, base):
        try:
            given = given_bytes(shards, state, batch)
        except ConfigError:
            continue  # a dimension that this mesh does not divide
        for remat, parts in itertools.product(REMAT, MICROBATCHES):
            work = dataclasses.replace(base, remat=remat, microbatches=parts)
            if stage.batch_size % (shards.rows * parts) or not pipeline_parts(work, shards):
                continue
            needed = memory(work, shards, given).total
            if needed <= room:
                seconds = step_time(work, shards, prepared.place, prepared.program.parameters).total
                found.append(Candidate(shards, remat, parts, needed, seconds))
    return sorted(found, key=lambda c: (round(c.seconds, 6), c.bytes_per_device))


def meshes(place: Place, work: Work) -> Iterator[Shards]:
    """Meshes of all chips whose axes divide what they split; sequences, where they are long."""
    chips = place.slice_chips
    for tensor, pipe in itertools.product(_divisors(math.gcd(work.heads, work.feed_forward)), _divisors(work.layers)):
        if tensor > LARGEST_TENSOR or pipe > LARGEST_PIPE or chips % (tensor * pipe):
            continue
        left = chips // (tensor * pipe)
        for context in _divisors(math.gcd(left, work.length)) if work.length >= LONG else [1]:
            for fsdp in _divisors(left // context):
                shards = Shards(left // context // fsdp * place.slices, fsdp, pipe, context, tensor)
                if work.rows % shards.rows == 0:
                    yield shards


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def with_candidate(config: RunConfig, index: int, candidate: Candidate) -> RunConfig:
    """The config run that way; stages other than `index` keep as many positions a microbatch, or more parts."""
    execution = config.execution.model_dump(mode="json")
    execution["mesh"] |= dict(zip(AXES, candidate.shards, strict=True))
    execution["compute"]["remat"] = candidate.remat
    stages: list[dict[str, Any]] = [stage.model_dump(mode="json") for stage in config.stages]
    chosen = stages[index]
    most = chosen["batch_size"] * chosen["sequence_length"] // candidate.microbatches
    for stage in stages:
        rows = stage["batch_size"] // candidate.shards.rows
        parts = [k for k in _divisors(rows) if stage["batch_size"] * stage["sequence_length"] // k <= most]
        stage["microbatches"] = parts[0] if parts else max(rows, 1)
    return with_changes(config, {"execution": execution, "stages": stages})


def search(
    config: RunConfig, place: Place, compile_best: int, price: float | None = None
) -> tuple[list[Candidate], list[Plan]]:
    """(all candidates of the longest stage, the plans of the best few as compiled, fastest first).

    Those that do not fit after all make room for the next.

    Raises:
        ConfigError: none fits; with what would.
    """
    start = MeshConfig(**dict(zip(AXES, (place.slices, 1, 1, 1, -1), strict=True)))  # rounds no batch
    prepared = prepare(_one_part(config), place, start)
    positions = [stage.steps * stage.batch_size * stage.sequence_length for stage in prepared.config.stages]
    index = positions.index(max(positions))
    ranked = candidates(prepared, prepared.config.stages[index])
    if not ranked:
        raise ConfigError(
            f"no mesh, remat policy or number of microbatches fits {place.describe()}; "
            f"{larger_place(place) or 'take a larger batch of chips'}"
        )
    plans: list[Plan] = []
    for candidate in _spread(ranked):
        if len(plans) == compile_best:
            break
        plan = make_plan(prepare(with_candidate(config, index, candidate), place), price=price)
        if plan.fits:
            plans.append(plan)
    return ranked, sorted(plans, key=lambda plan: plan.days)


def _one_part(config: RunConfig) -> RunConfig:
    stages = [stage.model_dump(mode="json") | {"microbatches": 1} for stage in config.stages]
    return with_changes(config, {"stages": stages})


def _spread(ranked: list[Candidate], most: int = 8) -> list[Candidate]:
    """The best of each mesh first: of one mesh, the next best differ in little."""
    first, rest = {}, []
    for candidate in ranked:
        if candidate.shards in first:
            rest.append(candidate)
        else:
            first[candidate.shards] = candidate
    best = sorted([*first.values(), *rest[:most]], key=lambda c: c.seconds)
    return best[:most]


def larger_place(place: Place) -> str:
    """`a larger slice, e.g. v5e:8x8`; empty where there is none."""
    bigger = [sides for sides in torus_shapes(place.chip) if math.prod(sides) >= 2 * place.slice_chips]
    return f"take a larger slice, e.g. {Place(place.chip, bigger[0]).name}" if bigger else ""


def advice(prepared: Prepared, plan: Plan) -> str:
    """What would make a plan fit: the fastest other way on the same place, or more chips."""
    index = next(i for i, stage in enumerate(plan.stages) if not fits(stage, plan.place))
    stage = prepared.config.stages[index]
    needed, has = plan.stages[index].bytes_per_device, plan.place.chip.usable_bytes
    ranked = candidates(prepared, stage)
    what = f"use {ranked[0].describe()} (about {ranked[0].bytes_per_device / 2**30:.1f} GiB)" if ranked else ""
    what = what or larger_place(plan.place) or "use a smaller model or batch"
    return (
        f"stage {stage.name} does not fit: {needed / 2**30:.1f} GiB a device of {has / 2**30:.2f} on "
        f"{plan.place.chip.name}; {what}"
    )
