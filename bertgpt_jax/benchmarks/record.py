"""What is kept of a benchmark: its JSON, and the rows of the README that are made of it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

import bertgpt_jax
from bertgpt_jax.benchmarks.harness import Result, Row, Watch
from bertgpt_jax.errors import DataError

FORMAT_VERSION = 1
DRIFT = 0.10
"""Difference between the medians of the first and the second half of a side's times that is worth a mark."""
PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "grain", "torch", "transformers", "tokenizers", "libtpu")
BEGIN, END = "<!-- results: tools/benchmark.py --table --readme README.md -->", "<!-- end of results -->"
"""Lines of the README between which `into_readme` writes."""

Malloc = Literal["system", "kept"]
"""Whether freed memory went back to the system, or stayed with the process (`training/heap.py`)."""


def document(
    name: str, settings: dict[str, Any], result: Result, watch: Watch, malloc: Malloc = "system"
) -> dict[str, Any]:
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
        "malloc": malloc,
        "failures": list(result.failures),
        "ratios": {peer: round(ratio, 4) for peer, ratio in result.ratios.items()},
        "rows": [tree_of(row) for row in result.rows],
        "facts": result.facts,
        "comparisons": result.comparisons,
        "settings": settings,
        **environment(),
    }


def tree_of(row: Row) -> dict[str, Any]:
    """A row as JSON has it; `Row(**tree)` reads it."""
    return {k: v for k, v in dataclasses.asdict(row).items() if v is not None and v is not False}


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


# ---------------------------------------------------------------- tables


def table(documents: Sequence[dict[str, Any]]) -> str:
    """Markdown of the rows of several records, a line each."""
    lines = ["| benchmark | measure | result | bar | machine |", "|---|---|---|---|---|"]
    for found in documents:
        machine = "; ".join([_machine(found), *notes(found)])
        lines += [
            f"| `{found['benchmark']}` | {row.measure} | {shown(row.value, row.unit)} | {bar(row)} | {machine} |"
            for row in (Row(**tree) for tree in found["rows"])
        ]
    return "\n".join(lines)


def block(documents: Sequence[dict[str, Any]]) -> str:
    """The README's table: what a reader should see of each record, and below it where and how it was measured."""
    lines = ["| `tools/benchmark.py` | what | result | bar |", "|---|---|---|---|"]
    places: dict[str, list[str]] = {}
    remarks = []
    for found in documents:
        name = f"`{found['benchmark']}`"
        for row in (Row(**tree) for tree in found["rows"]):
            if not row.detail:
                lines.append(f"| {name} | {row.measure} | {shown(row.value, row.unit)} | {bar(row)} |")
        places.setdefault(_place(found), []).append(name)
        remarks += [f"{name}: {note}." for note in notes(found)]
    # A line break after each: the lines of a paragraph would run into one another.
    below = [f"{', '.join(names)}: {place}." for place, names in places.items()] + remarks
    return "\n".join([*lines, "", *("- " + line for line in below)])


def into_readme(path: Path, documents: Sequence[dict[str, Any]]) -> None:
    """Replaces what stands between the markers of `path` by `block`.

    Raises:
        DataError: the markers are not there, once each and in order.
    """
    before, written, after = readme_parts(path)
    new = f"{before}{BEGIN}\n\n{block(documents)}\n\n{END}{after}"
    if new != f"{before}{BEGIN}{written}{END}{after}":
        path.write_text(new, "utf-8")


def readme_parts(path: Path) -> tuple[str, str, str]:
    """What stands before, between and behind the markers; see `into_readme`."""
    text = path.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    written, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise DataError(f"{path}: it must have the lines '{BEGIN}' and '{END}', once each; put them where results go")
    return before, written, after


def notes(found: dict[str, Any]) -> list[str]:
    """What a reader must know of a record before believing its numbers."""
    said, load = [], found["load"]
    if found["loaded"]:
        said.append(f"**disturbed**, others took {load['others'] + load['stolen']:.0%} of the machine")
    if load["drifting"]:
        sides = sum(len(comparison["seconds"]) for comparison in found["comparisons"].values())
        said.append(f"times moved while measuring ({len(load['drifting'])} of {sides} sides)")
    if found.get("malloc") == "kept":
        said.append("malloc kept freed memory, for all sides")
    if found.get("failures"):
        said.append(f"**failed**: {'; '.join(found['failures'])}")
    return said


def _machine(found: dict[str, Any]) -> str:
    hardware = found["hardware"]
    machine = hardware.get("devices", "")
    if not machine or "cpu" in machine.lower():
        machine = f"{hardware['cpus']} x {hardware['cpu']}"
    return machine


def _place(found: dict[str, Any]) -> str:
    topology = found["settings"].get("topology")
    where = f"compiled for {topology}, which was not there" if topology else _machine(found)
    versions = found["versions"]
    said = [("Python", "python"), ("jax", "jax"), ("torch", "torch")] if not topology else [("jax", "jax")]
    said += [("libtpu", "libtpu")] * bool(topology)
    return ", ".join([where, *(f"{label} {versions[key]}" for label, key in said if key in versions)])


def bar(row: Row) -> str:
    """`>= 2x`, with `(missed)` where it is; empty without a bar."""
    sides = ((">=", row.least), ("<=", row.most))
    said = ", ".join(f"{sign} {shown(value, row.unit)}" for sign, value in sides if value is not None)
    return said + ("" if row.met else " (missed)")


def shown(value: float, unit: str) -> str:
    """A value with its unit, in three digits: `2.13x`, `11.2M tokens/s`, `0.45 s`, `4,307 MiB`."""
    if unit == "x":
        return f"{value:.3g}x" if value < 100 else f"{value:.0f}x"
    for limit, factor, prefix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "K")):
        if abs(value) >= limit and unit.endswith("/s"):
            return f"{value / factor:.3g}{prefix} {unit}"
    return f"{value:,.0f} {unit}" if abs(value) >= 1000 else f"{value:.3g} {unit}".rstrip()
