"""Timing that can be believed: sides take turns in one process, medians are kept, and who else used the machine is too.

A benchmark is a module with a config `Settings` and `run(settings) -> Result`; it calls `compare` and puts what readers
should see into rows. `tools/benchmark.py NAME` runs it and writes the JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import bertgpt_jax
from bertgpt_jax.errors import ConfigError

FORMAT_VERSION = 1
REST_SECONDS = 0.02
"""Pause before each timed step: worker threads of the side before spin for a while when their work is done."""
BUSY_SHARE = 0.10
"""Share of this machine's CPU time that others may take before a measurement counts as disturbed."""
DRIFT = 0.10
"""Difference between the medians of the first and the second half of a side's times that is worth a mark."""
PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "grain", "torch", "transformers", "tokenizers", "libtpu")


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
    """

    measure: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None

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
    """

    rows: tuple[Row, ...]
    comparisons: dict[str, dict[str, Any]]
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


# ---------------------------------------------------------------- timing


def compare(sides: Sequence[Side], repeats: int, warmup: int = 2) -> dict[str, Any]:
    """Times the sides in turn (A, B, A, B, ...); the first is ours.

    Args:
        sides: one or more, with different names; all are prepared before the first is timed.
        repeats: timed rounds, at least 1; 9 or more for a number that is published.
        warmup: rounds before them that are not counted.

    Returns:
        `repeats`, `warmup`;
        `seconds`: side -> `median`, `p10`, `p90`, `min`, `drift` (second half's median over the first's, minus 1);
        `ratios`: peer -> its median over ours;
        `paired`: peer -> `median`, `p10`, `p90` of its time over ours, round by round.
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
    return summary({side.name: times[:, i] for i, side in enumerate(sides)}, warmup)


def summary(columns: dict[str, np.ndarray], warmup: int) -> dict[str, Any]:
    """What `compare` returns, of times [repeats] of each side that were taken elsewhere; the first is ours."""
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


def environment() -> dict[str, Any]:
    """Versions and hardware, without names of hosts, users or paths."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()
    hardware = {
        "cpu": _cpu_model(),
        "cpus": cpus,
        "cpus_of_machine": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if "jax" in sys.modules:
        devices = sys.modules["jax"].devices()
        hardware["devices"] = f"{len(devices)} x {devices[0].device_kind}"
    return {
        "versions": {"bertgpt_jax": bertgpt_jax.__version__, "python": platform.python_version(), **versions},
        "hardware": hardware,
    }


def _cpu_model() -> str:
    """The processor's model name; its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def require(*modules: str, extra: str, purpose: str) -> None:
    """ConfigError naming the extra unless all `modules` can be imported."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{purpose} needs {', '.join(missing)}; run: pip install 'bertgpt_jax[{extra}]'")


# ---------------------------------------------------------------- the record


def document(name: str, settings: dict[str, Any], result: Result, watch: Watch) -> dict[str, Any]:
    """The JSON of a run: every number, with the machine it is of and whether it was disturbed."""
    moved = [
        f"{label}: {side}"
        for label, comparison in result.comparisons.items()
        for side, spread in comparison["seconds"].items()
        if abs(spread["drift"]) > DRIFT
    ]
    return {
        "benchmark": name,
        "format_version": FORMAT_VERSION,
        "loaded": watch.loaded,
        "load": {"others": round(watch.others, 4), "stolen": round(watch.stolen, 4), "drifting": moved},
        "ratios": {peer: round(ratio, 4) for peer, ratio in result.ratios.items()},
        "rows": [{k: v for k, v in dataclasses.asdict(row).items() if v is not None} for row in result.rows],
        "facts": result.facts,
        "comparisons": result.comparisons,
        "settings": settings,
        **environment(),
    }


def table(documents: Sequence[dict[str, Any]]) -> str:
    """Markdown of the rows of several records, a line each."""
    lines = ["| benchmark | measure | result | bar | machine |", "|---|---|---|---|---|"]
    for found in documents:
        machine = found["hardware"].get("devices", "")
        if not machine or "cpu" in machine.lower():
            machine = f"{found['hardware']['cpus']} x {found['hardware']['cpu']}"
        if found["loaded"]:
            machine += f" (**disturbed**: others took {found['load']['others'] + found['load']['stolen']:.0%})"
        for tree in found["rows"]:
            row = Row(**tree)
            bar = f">= {shown(row.least, row.unit)}" if row.least is not None else ""
            bar = f"<= {shown(row.most, row.unit)}" if row.most is not None else bar
            bar += "" if row.met else " (missed)"
            lines.append(
                f"| `{found['benchmark']}` | {row.measure} | {shown(row.value, row.unit)} | {bar} | {machine} |"
            )
    return "\n".join(lines)


def shown(value: float, unit: str) -> str:
    """A value with its unit, in three digits: `2.13x`, `11.2M tokens/s`, `0.45 s`."""
    if unit == "x":
        return f"{value:.3g}x" if value < 100 else f"{value:.0f}x"
    for limit, factor, prefix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "K")):
        if abs(value) >= limit:
            return f"{value / factor:.3g}{prefix} {unit}"
    return f"{value:.3g} {unit}"
