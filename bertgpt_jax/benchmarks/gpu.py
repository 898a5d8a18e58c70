"""Benchmark `gpu`: everything about one GPU in one call of under ten minutes: checks, ceilings, steps, ablation.

Each part is the benchmark of its name in a process of its own: what one leaves in the GPU's memory, or dies of, is no
matter to the next. A part that no longer fits into the time is left out, and the record says so.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from time import perf_counter as now
from typing import Any, NamedTuple

import jax
from pydantic import Field

from bertgpt_jax.benchmarks import gpu_ablation, gpu_checks, gpu_step
from bertgpt_jax.benchmarks.ceilings import Settings as Ceilings
from bertgpt_jax.benchmarks.gpu_cases import Trial
from bertgpt_jax.benchmarks.harness import Result, Row
from bertgpt_jax.benchmarks.processes import started
from bertgpt_jax.config import Config, build

BENCHMARK = "import sys; from bertgpt_jax.commands.benchmark import main; sys.exit(main(sys.argv[1:]))"
"""What `python -c` runs for `tools/benchmark.py`."""
START = 10.0
"""Seconds that a process takes before it measures."""
LONGEST = 60.0
"""Seconds that what a part has begun may go on for when its minutes are over."""


class Settings(Config):
    """Settings of the benchmark."""

    seconds: float = Field(default=560.0, gt=0, description="for all; no part goes on for longer")
    checks: gpu_checks.Settings = gpu_checks.Settings()
    ceilings: Ceilings = Ceilings()
    step: gpu_step.Settings = gpu_step.Settings()
    ablation: gpu_ablation.Settings = gpu_ablation.Settings(minutes=2.0)
    trial: Trial = Field(default=Trial(), description="in place of step.trial and ablation.trial")


class Part(NamedTuple):
    """A benchmark that is called.

    Attributes:
        least: seconds without which it is not begun.
    """

    name: str
    settings: Config
    least: float


def run(settings: Settings) -> Result:
    """Calls one part after another.

    Raises:
        ConfigError: as `gpu_step` does, before anything is measured.
    """
    begun = now()
    gpu_step.check(plan(settings, settings.seconds)[2].settings)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for i in range(4):
            left = settings.seconds - (now() - begun)
            part = plan(settings, left)[i]
            if left < part.least:
                found[part.name] = {"left_out": f"{left:.0f} of {settings.seconds:g} seconds were left"}
                print(f"{part.name}: left out, {found[part.name]['left_out']}", flush=True)
            else:
                print(f"{part.name}:", flush=True)
                found[part.name] = called(part, Path(directory), left)
    return joined(found)


def plan(settings: Settings, left: float) -> list[Part]:
    """The parts, with what they may take of the seconds that are left; some are kept for the ablation."""
    trial = {} if settings.trial.is_full else {"trial": settings.trial.model_dump()}
    ablation = 60 * settings.ablation.minutes + START
    step_minutes = min(settings.step.minutes, max(left - START - ablation - LONGEST, 1.0) / 60)
    ablation_minutes = min(settings.ablation.minutes, max(left - START - LONGEST, 1.0) / 60)

    def within(part: Config, minutes: float) -> Config:
        return build(type(part), part.model_dump() | {"minutes": minutes} | trial, "gpu")

    return [
        Part("gpu_checks", settings.checks, START),
        Part("ceilings", settings.ceilings, START),
        Part("gpu_step", within(settings.step, step_minutes), START + LONGEST),
        Part("gpu_ablation", within(settings.ablation, ablation_minutes), START + 30),
    ]


def called(part: Part, directory: Path, timeout: float) -> dict[str, Any]:
    """The record of a part; `error` if it ended without one, or was cut off."""
    path, begun, last = directory / f"{part.name}.json", now(), "it said nothing"
    command = [sys.executable, "-c", BENCHMARK, part.name, "--json", str(path), "--allow-loaded"]
    command += ["--platform", {"gpu": "gpu", "tpu": "tpu"}.get(jax.default_backend(), "cpu")]
    command += [f"{key}={json.dumps(value)}" for key, value in part.settings.model_dump(mode="json").items()]
    with started(command, timeout) as process:
        for line in process.stdout:
            last = line.strip() or last
            print(f"  {line}", end="", flush=True)
        process.wait()
    seconds = now() - begun
    if path.is_file():
        return json.loads(path.read_text("utf-8")) | {"seconds": seconds}
    ended = f"cut off after {seconds:.0f} seconds" if seconds >= timeout else f"ended with {process.returncode}"
    return {"error": f"{ended}: {last}", "seconds": seconds}


def joined(found: dict[str, dict[str, Any]]) -> Result:
    """The parts' rows and numbers as one; a part that broke is a failure, one that was left out is not."""
    rows, comparisons, facts, failures = [], {}, {}, []
    for name, part in found.items():
        rows += [Row(**tree) for tree in part.get("rows", ())]
        comparisons |= {f"{name}: {label}": each for label, each in part.get("comparisons", {}).items()}
        kept = ("left_out", "error", "seconds", "settings", "facts", "loaded", "load")
        facts[name] = {key: part[key] for key in kept if key in part}
        failures += [f"{name}: {each}" for each in part.get("failures", ())]
        if "error" in part:
            failures.append(f"{name} {part['error']}")
        if "rows" not in part:
            rows.append(Row(f"{name}: {'LEFT OUT' if 'left_out' in part else 'FAILED'}", 0.0, ""))
    ratios = found.get("gpu_step", {}).get("ratios", {})
    return Result(tuple(rows), comparisons, ratios, facts, tuple(failures))
