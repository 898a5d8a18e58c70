"""Benchmark `gpu_step`: training steps of published sizes on one GPU, beside PyTorch in the same process.

bf16, AdamW in the step, batches built and placed while it runs. Sides take turns in blocks of steps; a step's time is
that between the ends of two. What fails is written down and marked, and the rest goes on.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from pydantic import Field

from bertgpt_jax.batches.examples import Batch
from bertgpt_jax.benchmarks.gpu_cases import (
    CASES,
    Case,
    Trial,
    examples_of_a_row,
    made_up_corpus,
    open_batches,
    run_config,
)
from bertgpt_jax.benchmarks.gpu_peers import Torch
from bertgpt_jax.benchmarks.gpu_sides import Ours, Stepper, drawn_parameters, programs_kept_in, short, timed
from bertgpt_jax.benchmarks.harness import Result, Row, require, summary
from bertgpt_jax.config import Config
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.training.hardware import peak_flops
from bertgpt_jax.training.run_config import RunConfig

AGREE = 0.01
"""Largest relative difference of the first losses, in bf16, with which two sides still do the same work."""
HELD_TO = "NVIDIA H200"
"""The device that the bars are meant for."""

Name = Literal[
    "gpt2_xl", "gpt2", "bert_base", "bert_large", "bert_large_512_packed", "gpt2_medium", "bert_large_512"
]  # fmt: skip


class Settings(Config):
    """Settings of the benchmark."""

    configs: tuple[Name, ...] = Field(default=tuple(CASES), min_length=1)
    peers: tuple[Literal["eager", "compile"], ...] = ("compile",)
    block: int = Field(default=20, ge=2, description="steps of a side's turn")
    blocks: int = Field(default=3, ge=1, description="turns of each side")
    compute: ComputeConfig = ComputeConfig(dtype="bfloat16", remat="gelu")
    words: int = Field(default=1_000_000, ge=1000, description="of the made-up text")
    minutes: float = Field(default=5.5, gt=0, description="no config is begun later than this")
    reserve: float = Field(
        default=35, ge=0, description="seconds for each config to come; with less left, ours is measured alone"
    )
    trial: Trial = Trial()


class Measured(NamedTuple):
    """What was seen of a config.

    Attributes:
        times: side -> seconds of its steps; ours first, sides that failed are missing.
        facts: JSON-ready.
    """

    times: dict[str, np.ndarray]
    facts: dict[str, Any]


def run(settings: Settings) -> Result:
    """Measures one config after another.

    Raises:
        ConfigError: peers that are not installed, or could get no memory; published sizes on CPUs.
    """
    check(settings)
    begun, found = time.perf_counter(), {}
    limit = 60 * settings.minutes
    with tempfile.TemporaryDirectory() as directory, programs_kept_in(Path(directory) / "programs"):
        for i, name in enumerate(settings.configs):
            spent, case = time.perf_counter() - begun, settings.trial.of(CASES[name])
            if spent > limit:
                found[name] = Measured({}, {"errors": {"ours": f"left out: {settings.minutes:g} minutes were over"}})
            else:
                alone = limit - spent < settings.reserve * (len(settings.configs) - i)
                found[name] = measure(case, settings, () if alone else settings.peers, Path(directory))
                found[name].facts.update(seconds=time.perf_counter() - begun - spent, peers_left_out=alone)
            _say(name, found[name])
    kind = jax.devices()[0].device_kind
    rows = [
        row for name, seen in found.items()
        for row in rows_of(settings.trial.of(CASES[name]), seen, kind, settings.trial.is_full)
    ]  # fmt: skip
    times = {name: summary(seen.times, 1) for name, seen in found.items() if "ours" in seen.times}
    label = "{1}" if len(settings.configs) == 1 else "{0}: {1}"
    ratios = {label.format(name, peer): ratio for name, seen in times.items() for peer, ratio in seen["ratios"].items()}
    return Result(tuple(rows), times, ratios, {name: seen.facts for name, seen in found.items()})


def check(settings: Settings) -> None:
    """ConfigError for what could only go wrong after minutes."""
    if settings.peers:
        purpose = "benchmark gpu_step with peers (peers=[] measures ours alone)"
        require("torch", "transformers", extra="parity", purpose=purpose)
    backend = jax.default_backend()
    if backend == "gpu" and settings.peers and os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") != "false":
        raise ConfigError(
            "XLA_PYTHON_CLIENT_PREALLOCATE is not 'false': jax would take the GPU's memory from torch; set it before "
            "jax starts (tools/benchmark.py does)"
        )
    needed = ("layers", "hidden", "heads", "length", "rows")
    if backend == "cpu" and any(getattr(settings.trial, name) is None for name in needed):
        raise ConfigError(
            "gpu_step at published sizes needs a GPU and jax sees none; for a trial on CPUs give "
            "trial.layers=2 trial.hidden=64 trial.heads=2 trial.vocabulary=512 trial.length=64 trial.rows=4"
        )


# ---------------------------------------------------------------- measuring


def measure(case: Case, settings: Settings, peers: Sequence[str], directory: Path) -> Measured:
    """Ours and the peers in turns; where they do not fit into memory together, one after the other, peers first."""
    facts: dict[str, Any] = {"errors": {}, "sizes": case._asdict()}
    errors, times = facts["errors"], {}
    peers = () if case.packed else peers  # transformers has no packed rows
    sides: list[Stepper] = []
    try:
        config = run_config(case, settings.compute, made_up_corpus(case, settings.words, directory))
        batches = open_batches(config, directory)
        facts["examples_of_a_row"] = examples_of_a_row(case, batches)
        sides = _sides(config, batches, peers)
        groups = [[side] for side in reversed(sides)] if case.apart else [sides]
        for group in groups:
            times |= _take_turns(group, settings, errors)
    except Exception as error:  # noqa: BLE001 (whatever it is, the other configs are still to be measured)
        errors["ours"] = short(error)
    for side in sides:
        facts[side.name] = side.facts
    _compare_losses(sides, times, errors)
    return Measured({side.name: times[side.name] for side in sides if side.name in times}, facts)


def _sides(config: RunConfig, batches: Callable[[int], Batch], peers: Sequence[str]) -> list[Stepper]:
    params = drawn_parameters(config) if peers else None
    return [Ours("ours", config, batches, restart=True), *(Torch(peer, config, params, batches) for peer in peers)]


def _take_turns(group: Sequence[Stepper], settings: Settings, errors: dict[str, str]) -> dict[str, np.ndarray]:
    """Side -> seconds of its steps; a side that fails is written into `errors` and left out from there on."""
    found: dict[str, list[np.ndarray]] = {}

    def attempt(side: Stepper, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # noqa: BLE001 (out of memory, most likely: the other sides go on)
            errors[side.name] = short(error)
        gc.collect()  # here the error is gone, and with it the frames that held arrays
        side.stop()
        return None

    for side in group:
        attempt(side, side.start)
    for _ in range(settings.blocks):
        for side in group:
            if side.name not in errors:
                took = attempt(side, lambda side=side: timed(side, settings.block))
                found.setdefault(side.name, []).append(took)
    for side in group:
        if side.name not in errors:
            attempt(side, side.stop)
    return {name: np.concatenate(blocks) for name, blocks in found.items() if name not in errors}


def _compare_losses(sides: Sequence[Stepper], times: dict[str, np.ndarray], errors: dict[str, str]) -> None:
    """Takes the times of sides away that did not begin with our loss: they do other work."""
    losses = {side.name: side.facts["loss"] for side in sides if side.name in times}
    for name, loss in losses.items():
        first = losses.get("ours", loss)
        if not abs(loss / first - 1) <= AGREE:
            errors[name] = f"its first loss is {loss:.4f}, ours {first:.4f}: over {AGREE:.0%} apart"
            del times[name]


# ---------------------------------------------------------------- showing


def rows_of(case: Case, seen: Measured, device_kind: str, full: bool) -> list[Row]:
    """What readers see of a config: rates, both conventions of utilisation, memory and first steps."""
    shape = f"{case.label if full else f'trial of {case.label},'} T={case.length} B={case.rows}"
    least = case.least if full and device_kind.startswith(HELD_TO) else None
    if "ours" not in seen.times:
        return [Row(f"{shape}: FAILED: {seen.facts['errors']['ours'][:80]}", 0.0, case.unit, least)]
    rates = {name: rate(case, seen, name) for name in seen.times}
    rows = [Row(shape, rates["ours"], case.unit, least)]
    rows += [Row(f"{shape}: torch, {name}", r, case.unit) for name, r in rates.items() if name != "ours"]
    for name, share in utilisation(case, float(np.median(seen.times["ours"])), device_kind).items():
        rows.append(Row(f"{shape}: MFU, {name}", 100 * share, "%"))
    ours = seen.facts["ours"]
    rows.append(Row(f"{shape}: memory of a step", ours["bytes"] / 2**30, "GiB"))
    rows += [Row(f"{shape}: first step, {start} cache", s, "s") for start, s in ours["first_step"].items()]
    return rows


def rate(case: Case, seen: Measured, name: str) -> float:
    """Tokens or examples a second of a side, from the median of its steps."""
    each = case.length if case.unit == "tokens/s" else seen.facts.get("examples_of_a_row", 1.0)
    return case.rows * each / float(np.median(seen.times[name]))


def utilisation(case: Case, seconds: float, device_kind: str) -> dict[str, float]:
    """Share of the device's peak that a step's own arithmetic comes to, by convention; empty for unknown devices."""
    peak = peak_flops(device_kind)
    if peak is None:
        return {}
    config = run_config(case, ComputeConfig())
    scored, tokens = config.objective.scored_share(case.length), case.rows * case.length
    conventions = {"causal attention by half": True, "attention in full": False}
    if case.kind == "bert":
        conventions = {"attention in full": False}
    return {
        name: config.model.flops_per_token(case.length, scored, halved=halved) * tokens / seconds / peak
        for name, halved in conventions.items()
    }


def _say(name: str, seen: Measured) -> None:
    medians = ", ".join(f"{side} {1e3 * float(np.median(times)):.1f} ms" for side, times in seen.times.items())
    errors = "; ".join(f"{side} FAILED: {error}" for side, error in seen.facts["errors"].items())
    took = f" ({seen.facts['seconds']:.0f} s)" if "seconds" in seen.facts else ""
    print(f"  {name}: {'; '.join(x for x in (medians, errors) if x)}{took}", flush=True)
