"""Benchmark `gpu_ablation`: what each technique gives a training step on one GPU, beside what was predicted.

The real step with one technique more in every rung, on a batch that lies on the device. The rungs take turns in blocks
of steps, all on one training state, so that the memory is that of the largest. What the package has no setting for is
taken out of it while a rung is compiled: the plain layer norm, projections as one product, the textbook's loss.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from pydantic import Field

from bertgpt_jax.benchmarks import cpu_bert, cpu_gpt
from bertgpt_jax.benchmarks.gpu_cases import CASES, Case, Trial, run_config
from bertgpt_jax.benchmarks.gpu_rungs import LADDERS, Rung, without
from bertgpt_jax.benchmarks.gpu_sides import short, timed
from bertgpt_jax.benchmarks.gpu_step import HELD_TO
from bertgpt_jax.benchmarks.harness import Result, Row, summary
from bertgpt_jax.benchmarks.memory_ladder import NaiveCausalLM, NaiveMaskedLMNSP
from bertgpt_jax.config import Config, build
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.shapes import Array
from bertgpt_jax.training import memory
from bertgpt_jax.training.ahead import lower_step
from bertgpt_jax.training.run_config import RunConfig, with_changes

MISS = 0.15
"""How far a gain may be from what was predicted."""
WARMUP = 3


class Settings(Config):
    """Settings of the benchmark."""

    ladders: tuple[Literal["gpt2", "bert_base"], ...] = Field(default=("gpt2", "bert_base"), min_length=1)
    block: int = Field(default=10, ge=2, description="steps of a rung's turn")
    blocks: int = Field(default=3, ge=1, description="turns of each rung")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    minutes: float = Field(default=3.0, gt=0, description="no rung is compiled later than this")
    trial: Trial = Trial()


def run(settings: Settings) -> Result:
    """Climbs the ladders.

    Raises:
        ConfigError: published sizes on CPUs.
    """
    needed = ("layers", "hidden", "heads", "length", "rows")
    if jax.default_backend() == "cpu" and any(getattr(settings.trial, name) is None for name in needed):
        raise ConfigError(
            "gpu_ablation at published sizes needs a GPU and jax sees none; for a trial on CPUs give "
            "trial.layers=2 trial.hidden=64 trial.heads=2 trial.vocabulary=512 trial.length=128 trial.rows=4"
        )
    begun, rows, comparisons, facts = time.perf_counter(), [], {}, {}
    held = settings.trial.is_full and jax.devices()[0].device_kind.startswith(HELD_TO)
    for name in settings.ladders:
        case = settings.trial.of(CASES[name])
        found, times = climb(case, LADDERS[name], settings, begun + 60 * settings.minutes)
        if times:
            comparisons[name] = summary(times, WARMUP)
        label = case.label if settings.trial.is_full else f"trial of {name},"
        rows += rows_of(f"{label} T={case.length} B={case.rows}", LADDERS[name], found, held)
        facts[name] = found
    return Result(tuple(rows), comparisons, facts=facts)


def rows_of(shape: str, rungs: tuple[Rung, ...], found: dict[str, Any], held: bool) -> list[Row]:
    """Milliseconds of each rung and its gain; writes predictions, and whether one is missed, beside what was found.

    A gain is `paired_gain`, the median over the steps of both rungs; where there is none, that of the medians.
    """
    rows, before = [], None
    for rung in rungs:
        seen = found[rung.name]
        seen["predicted_ms"] = rung.predicted
        if "ms" not in seen:
            rows.append(Row(f"{shape}: {rung.name}: FAILED: {seen['error'][:80]}", 0.0, "ms"))
            before = None
            continue
        rows.append(Row(f"{shape}: {rung.name}", seen["ms"], "ms"))
        if before is not None:
            gain = seen.get("paired_gain", found[before.name]["ms"] / seen["ms"])
            predicted = before.predicted / rung.predicted
            least, most = (predicted * (1 - MISS), predicted * (1 + MISS)) if held else (None, None)
            rows.append(Row(f"{shape}: {rung.name}, gain (predicted {predicted:.3g}x)", gain, "x", least, most))
            seen |= {"gain": gain, "predicted_gain": predicted, "missed": abs(gain / predicted - 1) > MISS}
        before = rung
    return rows


# ---------------------------------------------------------------- the rungs of a ladder


@dataclasses.dataclass
class Held:
    """The training state that the rungs of a ladder hand on to one another; None where the next is to draw one."""

    state: Any = None


class OnOneBatch:
    """The rung's step, over and over on one batch (a `gpu_sides.Stepper`).

    Args:
        held: the state that it goes on with, and leaves behind; its first update is of parameters of its own.

    Attributes:
        bytes: that a step takes.
        loss: of the first update.
    """

    def __init__(self, case: Case, rung: Rung, dtype: str, held: Held | None = None):
        config, device = step_config(case, rung, dtype), jax.devices()[:1]
        objective = None
        if rung.naive_loss:
            naive = NaiveCausalLM if case.kind == "gpt" else NaiveMaskedLMNSP
            objective = naive(**config.objective.model_dump())
        jax.clear_caches()  # a trace of the rung before would be taken for this one's
        with without(rung):
            lowered = lower_step(config, device, objective=objective)
        self._step, self._draw = lowered.step.compile(), lowered.program.init
        self.bytes = memory.step_bytes(self._step)
        batch = make_batch(case, rung)
        shapes = lowered.program.abstract_batch(lowered.stage)
        self._batch = {name: jax.device_put(batch[name].astype(x.dtype), x.sharding) for name, x in shapes.items()}
        self._held = Held()
        self.loss = float(self.update())
        if held is not None and held.state is None:
            held.state = self._held.state
        self._held = held or self._held

    def update(self) -> Array:
        """Queues an update."""
        state = self._draw() if self._held.state is None else self._held.state
        self._held.state = None  # given away, also where the step fails
        self._held.state, metrics = self._step(state, self._batch)
        return metrics["loss"]

    def wait(self, handle: Array) -> None:
        """Returns when the update is done."""
        handle.block_until_ready()


def climb(
    case: Case, ladder: tuple[Rung, ...], settings: Settings, deadline: float
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """`ms`, `loss`, `bytes` of each rung, `error` where it failed or was left out; and the seconds of its steps.

    Rungs are compiled one after another, as long as there is time, and then take turns.
    """
    found: dict[str, dict[str, Any]] = {}
    sides: dict[str, OnOneBatch] = {}
    blocks: dict[str, list[np.ndarray]] = {}
    held = Held()

    def attempt(name: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # noqa: BLE001 (out of memory, most likely: the other rungs go on)
            found[name]["error"] = short(error)
        sides.pop(name, None)
        blocks.pop(name, None)
        held.state = None
        gc.collect()  # here the error is gone, and with it the frames that held arrays
        return None

    for rung in ladder:
        begun, name = time.perf_counter(), rung.name
        found[name] = {}
        if begun > deadline:
            found[name]["error"] = f"left out: {settings.minutes:g} minutes were over"
            continue
        side = attempt(name, lambda rung=rung: OnOneBatch(case, rung, settings.dtype, held))
        if side is not None:
            sides[name] = side
            found[name] |= {"loss": side.loss, "bytes": side.bytes, "seconds": time.perf_counter() - begun}
    for turn in range(-1, settings.blocks):
        for name, side in list(sides.items()):
            steps = settings.block if turn >= 0 else WARMUP
            took = attempt(name, lambda side=side, steps=steps: timed(side, steps))
            if turn >= 0 and took is not None:
                blocks.setdefault(name, []).append(took)
    times = {name: np.concatenate(taken) for name, taken in blocks.items()}
    _add_times(case, ladder, found, times)
    return found, times


def _add_times(
    case: Case, ladder: tuple[Rung, ...], found: dict[str, dict[str, Any]], times: dict[str, np.ndarray]
) -> None:
    """Writes `ms` and `paired_gain` into what was found, and says so."""
    for before, rung in zip((None, *ladder), ladder, strict=False):
        seen, taken = found[rung.name], times.get(rung.name)
        if taken is not None:
            seen["ms"] = 1e3 * float(np.median(taken))
            if before is not None and before.name in times:
                seen["paired_gain"] = float(np.median(times[before.name] / taken))
        said = f"{seen['ms']:.1f} ms" if "ms" in seen else f"FAILED: {seen['error']}"
        print(f"  {case.label}: {rung.name}: {said}", flush=True)


def step_config(case: Case, rung: Rung, dtype: str) -> RunConfig:
    """The run whose step is compiled."""
    config = run_config(case, build(ComputeConfig, {"dtype": dtype, **_fitting(case, rung.compute)}, "rung"))
    if not rung.everywhere:
        return config
    masking = {"max_predictions": case.length, "rate": 0.999}
    objective = config.objective.model_dump(mode="json")
    return with_changes(config, {"objective": objective | {"masking": objective["masking"] | masking}})


def _fitting(case: Case, compute: dict[str, Any]) -> dict[str, Any]:
    """The settings, with chunks no longer than the rows of a trial."""
    chunk = compute.get("head_chunk")
    return compute if chunk is None else compute | {"head_chunk": min(chunk, case.length)}


def make_batch(case: Case, rung: Rung) -> dict[str, np.ndarray]:
    """Random tokens."""
    sizes = dict(vocabulary=case.vocabulary, length=case.length, rows=case.rows)
    if case.kind == "gpt":
        return cpu_gpt.make_batch(cpu_gpt.Settings(**sizes))
    masked = MaskedLMNSP(masking=run_config(case, ComputeConfig()).objective.masking).scored_share(case.length)
    batch = cpu_bert.make_batch(cpu_bert.Settings(**sizes, masked=masked))
    return cpu_bert.every_position(batch) if rung.everywhere else batch
