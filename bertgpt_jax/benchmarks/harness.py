"""Timing that can be believed: sides take turns in one process, medians are kept, and who else used the machine is too.

A benchmark is a module with a config `Settings` and `run(settings) -> Result`; it calls `compare` and puts what readers
should see into rows. `tools/benchmark.py NAME` runs it and writes the JSON (`benchmarks/record.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil

from bertgpt_jax.errors import ConfigError

REST_SECONDS = 0.02
"""Pause before each timed step: worker threads of the side before spin for a while when their work is done."""
BUSY_SHARE = 0.10
"""Share of this machine's CPU time that others may take before a measurement counts as disturbed."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to do the work.

    Attributes:
        name: `ours`, or the peer's.
        prepare: () -> state; not timed.
        step: state -> anything; timed. Returns when the work is done (`jax.block_until_ready`), not when it is queued.
    """

    name: str
    prepare: Callable[[], Any]
    step: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """A number for the README's table.

    Attributes:
        measure: what was measured.
        value: the number; `unit`: `x`, `tokens/s`, `s`, ...
        least, most: the bar it is held to, if any.
        detail: left out of the README.
    """

    measure: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None
    detail: bool = False

    @property
    def met(self) -> bool:
        """Whether the bar is met; True without one."""
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a benchmark found.

    Attributes:
        rows: the numbers a reader should see.
        comparisons: name -> what `compare` returned.
        ratios: peer -> its median over ours.
        facts: whatever else belongs to the record: shapes, losses that agreed, counts; JSON-ready.
        failures: what was found to be wrong, a sentence each; the command fails once all is written.
    """

    rows: tuple[Row, ...]
    comparisons: dict[str, dict[str, Any]]
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    failures: tuple[str, ...] = ()


# ---------------------------------------------------------------- timing


def compare(sides: Sequence[Side], repeats: int, warmup: int = 2) -> dict[str, Any]:
    """Times the sides in turn and sums up (`measure`, `summary`); the first is ours."""
    return summary(measure(sides, repeats, warmup), warmup)


def measure(sides: Sequence[Side], repeats: int, warmup: int = 2) -> dict[str, np.ndarray]:
    """Times the sides in turn (A, B, A, B, ...).

    Args:
        sides: one or more, with different names; all are prepared before the first is timed.
        repeats: timed rounds, at least 1; 9 or more for a number that is published.
        warmup: rounds before them that are not counted.

    Returns:
        Side -> seconds [repeats].
    """
    states = [side.prepare() for side in sides]
    times = np.empty((repeats, len(sides)))
    for turn in range(-warmup, repeats):
        gc.collect()
        for i, (side, state) in enumerate(zip(sides, states, strict=True)):
            time.sleep(REST_SECONDS)
            begun = time.perf_counter()
            side.step(state)
            took = time.perf_counter() - begun
            if turn >= 0:
                times[turn, i] = took
    return {side.name: times[:, i] for i, side in enumerate(sides)}


def summary(columns: dict[str, np.ndarray], warmup: int) -> dict[str, Any]:
    """What is kept of times [repeats] of each side; the first is ours.

    Returns:
        `repeats`, `warmup`;
        `seconds`: side -> `median`, `p10`, `p90`, `min`, `drift` (second half's median over the first's, minus 1);
        `ratios`: peer -> its median over ours;
        `paired`: peer -> `median`, `p10`, `p90` of its time over ours, round by round.
    """
    names = list(columns)
    ours, peers = columns[names[0]], names[1:]
    return {
        "repeats": len(ours),
        "warmup": warmup,
        "seconds": {name: _spread(column) | {"drift": _drift(column)} for name, column in columns.items()},
        "ratios": {name: float(np.median(columns[name]) / np.median(ours)) for name in peers},
        "paired": {name: _spread(columns[name] / ours) for name in peers},
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    p10, median, p90 = (float(v) for v in np.percentile(values, (10, 50, 90)))
    return {"median": median, "p10": p10, "p90": p90, "min": float(values.min())}


def _drift(values: np.ndarray) -> float:
    half = len(values) // 2
    return float(np.median(values[half:]) / np.median(values[:half]) - 1) if half else 0.0


def rate(comparison: dict[str, Any], side: str, work: float) -> float:
    """`work` (tokens, rows, ...) of a step over the side's median seconds."""
    return work / comparison["seconds"][side]["median"]


# ---------------------------------------------------------------- the machine


@dataclasses.dataclass
class Watch:
    """How much of the machine others used while a `with` block ran; the time of processes we waited for is ours.

    Attributes:
        others: CPU time that neither we nor our finished children used, as a share of all cores' time.
        stolen: share of time the hypervisor gave to other machines, where it tells.
    """

    others: float = 0.0
    stolen: float = 0.0

    def __enter__(self) -> Watch:
        self._begun = _cpu_seconds()
        return self

    def __exit__(self, *_: Any) -> None:
        wall, busy, stolen, own = (b - a for a, b in zip(self._begun, _cpu_seconds(), strict=True))
        whole = max(wall * (psutil.cpu_count() or 1), 1e-9)
        self.others, self.stolen = max(busy - own, 0.0) / whole, stolen / whole

    @property
    def loaded(self) -> bool:
        """Whether somebody else used more than `BUSY_SHARE` of the machine."""
        return self.others + self.stolen > BUSY_SHARE


def _cpu_seconds() -> tuple[float, float, float, float]:
    """Seconds: wall clock, busy in the machine, stolen, and ours with our children."""
    times = psutil.cpu_times()
    busy = times.user + times.system + sum(getattr(times, name, 0.0) for name in ("nice", "irq", "softirq"))
    mine = psutil.Process().cpu_times()
    own = mine.user + mine.system + getattr(mine, "children_user", 0.0) + getattr(mine, "children_system", 0.0)
    for child in psutil.Process().children(recursive=True):  # what still runs: torch keeps processes that compile
        with contextlib.suppress(psutil.Error):
            spent = child.cpu_times()
            own += spent.user + spent.system
    return time.perf_counter(), busy, getattr(times, "steal", 0.0), own


def look_around(seconds: float = 1.0) -> Watch:
    """A `Watch` over a while in which this process sleeps."""
    with Watch() as watch:
        time.sleep(seconds)
    return watch


def use_cpus(count: int) -> None:
    """Confines this process to the first `count` CPUs it may use, OpenMP too; before jax and torch are imported."""
    if count and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    if count:
        os.environ["OMP_NUM_THREADS"] = str(count)


def require(*modules: str, extra: str, purpose: str) -> None:
    """ConfigError naming the extra unless all `modules` can be imported."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{purpose} needs {', '.join(missing)}; run: pip install 'bertgpt_jax[{extra}]'")
