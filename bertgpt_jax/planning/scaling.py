"""Weak scaling on paper: the same rows a chip on more and more chips, each with its fastest layout by the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.planning.places import Place
from bertgpt_jax.planning.plan import prepare
from bertgpt_jax.planning.published import PublishedRun, runs
from bertgpt_jax.planning.roofline import StepTime, step_time
from bertgpt_jax.planning.search import candidates, unrounded_mesh
from bertgpt_jax.planning.work import work_of
from bertgpt_jax.training.run_config import RunConfig, with_changes

MAXTEXT_SLICES = {"MaxText 16B": {32: 0.547}, "MaxText 32B": {32: 0.604}}
"""Published MFU on slices of v5e-256 (AI-Hypercomputer/maxtext MaxText/configs/v5e/README.md)."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A run on one place.

    Attributes:
        layout: mesh, remat policy, microbatches.
        mfu: causal attention halved; of a published model as its publisher counts.
        published: MFU there, if it is.
    """

    chips: int
    place: str
    layout: str
    rows: int
    mfu: float
    time: StepTime
    published: float | None = None


def weak_scaling(config: RunConfig, places: Sequence[Place], stage: int = 0) -> list[Point]:
    """One point a place, the batch in proportion to the chips; the config's batch is that of the largest place.

    Raises:
        ConfigError: a place on which nothing fits, or a batch below one row.
    """
    most, points = max(place.chips for place in places), []
    for place in places:
        rows, rest = divmod(config.stages[stage].batch_size * place.chips, most)
        if rest or not rows:
            raise ConfigError(
                f"stage {config.stages[stage].name}: batch_size {config.stages[stage].batch_size} on {most} chips is "
                f"no whole number of rows on {place.chips}; use a multiple of {most // place.chips}"
            )
        points.append(_point(_with_rows(config, stage, rows), place, stage))
    return points


def _with_rows(config: RunConfig, stage: int, rows: int) -> RunConfig:
    stages = [one.model_dump(mode="json") | {"microbatches": 1} for one in config.stages]
    stages[stage] |= {"batch_size": rows, "batch_ramp": []}
    return with_changes(config, {"stages": stages})


def _point(config: RunConfig, place: Place, index: int) -> Point:
    prepared = prepare(config, place, unrounded_mesh(config, place))
    stage = prepared.config.stages[index]
    ranked = candidates(prepared, stage)
    if not ranked:
        raise ConfigError(f"nothing fits on {place.describe()} with {stage.batch_size} rows")
    best = ranked[0]
    work = work_of(prepared.config, stage, place.chip.platform, best.shards.context)
    work = dataclasses.replace(work, remat=best.remat, microbatches=best.microbatches)
    time = step_time(work, best.shards, place, prepared.program.parameters)
    scored = config.objective.scored_share(stage.sequence_length)
    flops = prepared.config.model.flops_per_token(stage.sequence_length, scored, halved=True) * work.positions
    mfu = flops / time.total / (place.chips * place.chip.flops)
    return Point(place.chips, _name(place), best.describe(), stage.batch_size, mfu, time)


def published_scaling(slices: Sequence[int]) -> list[tuple[str, list[Point]]]:
    """MaxText's own models over slices of v5e, replicas between them, as the time model has them."""
    found = []
    for run in runs():
        if run.name in MAXTEXT_SLICES and run.place.chip.name == "v5e":
            found.append((run.name, [_on_slices(run, count) for count in slices]))
    return found


def _on_slices(run: PublishedRun, slices: int) -> Point:
    several = dataclasses.replace(
        run,
        place=dataclasses.replace(run.place, slices=slices),
        shards=run.shards._replace(data=slices),
        work=dataclasses.replace(run.work, rows=run.work.rows * slices),
    )
    time = step_time(several.work, several.shards, several.place, several.parameters)
    known = run.mfu if slices == 1 else MAXTEXT_SLICES[run.name].get(slices)
    layout = f"fsdp per slice, remat={run.work.remat}"
    return Point(several.place.chips, _name(several.place), layout, several.work.rows, several.predicted(), time, known)


def _name(place: Place) -> str:
    return (f"{place.slices} x " if place.slices > 1 else "") + place.name


def markdown(title: str, points: Sequence[Point]) -> str:
    """A table of points, with what is kept of the first's MFU."""
    published = any(point.published for point in points)
    head = "| chips | place | rows | layout | matmul | hbm | ici | dcn | step | MFU | kept |"
    rows = [f"**{title}**", "", head + (" published |" if published else ""), "|" + "---|" * (11 + published)]
    for point in points:
        t, seconds = point.time, "{:.3g} s".format
        cells = [f"{point.chips:,}", point.place, f"{point.rows:,}", point.layout]
        cells += [*map(seconds, (t.matmul, t.hbm, t.ici, t.dcn, t.total)), f"{point.mfu:.1%}"]
        cells.append(f"{point.mfu / points[0].mfu:.0%}")
        if published:
            cells.append(f"{point.published:.1%}" if point.published else "")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def as_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    """JSON tree of points."""
    return [dataclasses.asdict(point) for point in points]
