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
from bertgpt_jax.planning.plan import Plan, Prepared, fits, make_plan, planned_state, prepare, with_execution
from bertgpt_jax.planning.roofline import step_time
from bertgpt_jax.planning.work import Shards, Work, pipeline_parts, work_of
from bertgpt_jax.training.run_config import RunConfig, StageConfig, with_changes

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
TRIES = 8
"""Layouts that are compiled at most to find the best few that fit as compiled."""
MOST_SLICES = 64
"""A run that needs more than so many of the largest slices is told to be smaller."""


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
    divided = prepared.config.execution.shard_optimizer  # its shardings depend on the mesh
    state = planned_state(prepared, stage)
    batch = prepared.program.abstract_batch(stage)
    base = work_of(prepared.config, stage, prepared.place.chip.platform)
    split = work_of(prepared.config, stage, prepared.place.chip.platform, context=2).fused_attention
    found, room = [], prepared.place.chip.usable_bytes * ROOM
    for shards in meshes(prepared.place, base):
        fused = split if shards.context > 1 else base.fused_attention
        if divided:
            sizes = dict(zip(AXES, shards, strict=True))
            state = planned_state(dataclasses.replace(prepared, sizes=sizes), stage)
        try:
            given = given_bytes(shards, state, batch)
        except ConfigError:
            continue  # a dimension that this mesh does not divide
        for remat, parts in itertools.product(REMAT, MICROBATCHES):
            work = dataclasses.replace(base, remat=remat, microbatches=parts, fused_attention=fused)
            if stage.batch_size % (shards.batch * parts) or not pipeline_parts(work, shards):
                continue
            needed = memory(work, shards, given).total
            if needed <= room:
                seconds = step_time(work, shards, prepared.place, prepared.program.parameters).total
                found.append(Candidate(shards, remat, parts, needed, seconds))
    return sorted(found, key=lambda c: (round(c.seconds, 6), c.bytes_per_device))


def meshes(place: Place, work: Work) -> Iterator[Shards]:
    """Meshes of all chips whose axes divide what they split; sequences, where they are long."""
    chips, replicas = place.slice_chips, place.slices // work.dcn_fsdp
    for tensor, pipe in itertools.product(_divisors(math.gcd(work.heads, work.feed_forward)), _divisors(work.layers)):
        if tensor > LARGEST_TENSOR or pipe > LARGEST_PIPE or chips % (tensor * pipe):
            continue
        left = chips // (tensor * pipe)
        for context in _divisors(math.gcd(left, work.length)) if work.length >= LONG else [1]:
            for fsdp in _divisors(left // context):
                shards = Shards(left // context // fsdp * replicas, fsdp * work.dcn_fsdp, pipe, context, tensor)
                if work.rows % shards.batch == 0:
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
        rows = stage["batch_size"] // candidate.shards.batch
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
    prepared = prepare(_one_part(config), place, unrounded_mesh(config, place))
    positions = [stage.steps * stage.batch_size * stage.sequence_length for stage in prepared.config.stages]
    index = positions.index(max(positions))
    ranked = candidates(prepared, prepared.config.stages[index])
    if not ranked:
        raise ConfigError(
            f"no mesh, remat policy or number of microbatches fits {place.describe()}; "
            f"{larger_place(prepared, prepared.config.stages[index])}"
        )
    plans: list[Plan] = []
    tried = _spread(ranked, max(compile_best, TRIES))
    for candidate in tried:
        if len(plans) == compile_best:
            break
        plan = make_plan(prepare(with_candidate(config, index, candidate), place), price=price)
        if plan.fits:
            plans.append(plan)
    if not plans:
        raise ConfigError(
            f"none of the {len(tried)} fastest layouts that the model lets fit {place.name} fits as compiled; "
            f"{larger_place(prepared, prepared.config.stages[index])}"
        )
    return ranked, sorted(plans, key=lambda plan: plan.days)


def _one_part(config: RunConfig) -> RunConfig:
    stages = [stage.model_dump(mode="json") | {"microbatches": 1} for stage in config.stages]
    return with_changes(config, {"stages": stages})


def unrounded_mesh(config: RunConfig, place: Place) -> MeshConfig:
    """A mesh of all chips that rounds no batch, to begin a search with."""
    across = config.execution.mesh.dcn_fsdp
    return MeshConfig(**dict(zip(AXES, (max(place.slices // across, 1), across, 1, 1, -1), strict=True)))


def _spread(ranked: list[Candidate], most: int) -> list[Candidate]:
    """The best of each mesh first: of one mesh, the next best differ in little."""
    first, rest = {}, []
    for candidate in ranked:
        if candidate.shards in first:
            rest.append(candidate)
        else:
            first[candidate.shards] = candidate
    best = sorted([*first.values(), *rest[:most]], key=lambda c: c.seconds)
    return best[:most]


def larger_place(prepared: Prepared, stage: StageConfig) -> str:
    """`take v5e:8x8, with fsdp=64 remat=full microbatches=1`: the next larger place on which the model lets it fit."""
    mesh = prepared.config.execution.mesh
    for place in _larger_places(prepared.place):
        for across in sorted({min(mesh.dcn_fsdp, place.slices), place.slices}):  # replicas between slices, then shards
            changed = {"mesh": mesh.model_dump(mode="json") | {"dcn_data": None, "dcn_fsdp": across}}
            config = with_execution(prepared.config, changed)
            ranked = candidates(dataclasses.replace(prepared, place=place, config=config), stage)
            if ranked:
                slices = f" --slices {place.slices}" if place.slices > 1 else ""
                spans = f" execution.mesh.dcn_fsdp={across}" if across > 1 else ""
                return f"take {place.name}{slices}, with {ranked[0].describe()}{spans}"
    return f"no number of chips {prepared.place.chip.name} would do; use a smaller model or sequence_length"


def _larger_places(place: Place) -> Iterator[Place]:
    """Each about twice as large as the one before: larger slices, then several of the largest."""
    chips = place.chips
    for sides in torus_shapes(place.chip):
        if math.prod(sides) * place.slices >= 2 * chips:
            chips = math.prod(sides) * place.slices
            yield (larger := dataclasses.replace(place, sides=sides))
    largest = larger if chips > place.chips else place
    slices = 2 * largest.slices
    while slices <= MOST_SLICES:
        yield dataclasses.replace(largest, slices=slices)
        slices *= 2


def advice(prepared: Prepared, plan: Plan) -> str:
    """What would make a plan fit: the fastest other way on the same place, or more chips."""
    index = next(i for i, stage in enumerate(plan.stages) if not fits(stage, plan.place))
    stage, found = prepared.config.stages[index], plan.stages[index]
    needed, has = found.bytes_per_device, plan.place.chip.usable_bytes
    more = max(needed / found.model.total, 1.0)  # where the model said too little, it will of others like it
    same = (prepared.shards, found.work.remat, found.work.microbatches)
    ranked = [
        c
        for c in candidates(prepared, stage)
        if (c.shards, c.remat, c.microbatches) != same and c.bytes_per_device * more <= has
    ]
    what = f"use {ranked[0].describe()} (about {ranked[0].bytes_per_device * more / 2**30:.1f} GiB)" if ranked else ""
    return (
        f"stage {stage.name} does not fit: {needed / 2**30:.1f} GiB a device of {has / 2**30:.2f} on "
        f"{plan.place.chip.name}; {what or larger_place(prepared, stage)}"
    )
