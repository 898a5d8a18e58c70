"""Benchmark `time_to_loss`: seconds from a command to a held-out loss, start-up included, beside a nanoGPT in PyTorch.

The run is `configs/gpt/shakespeare_char.py`, with the same model, optimizer, schedule and evaluations on all sides,
each a process of its own that begins with the raw text. All compile anew. Sides take turns, run by run.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from bertgpt_jax.benchmarks.harness import Result, Row, require, summary
from bertgpt_jax.benchmarks.processes import TRAIN, started
from bertgpt_jax.config import Config, load_config, to_json
from bertgpt_jax.errors import DataError
from bertgpt_jax.training.run_config import RunConfig

SAMPLE = Path("../shared/data/lm/tinyshakespeare/input.txt.gz")
_HELD_OUT = re.compile(r"^step ([\d,]+) held out: loss ([\d.]+|nan)")
Name = Literal["ours", "eager", "compile"]


class Settings(Config):
    """Settings of the benchmark."""

    text: str = Field(
        default=str(SAMPLE), description="Shakespeare's works, as nanoGPT's data/shakespeare_char has them"
    )
    target: float = Field(default=1.88, gt=0, description="held-out loss; nanoGPT's published one")
    steps: int = Field(default=2000, ge=200)
    eval_every: int = Field(default=100, ge=1)
    sides: tuple[Name, ...] = ("ours", "eager", "compile")
    rounds: int = Field(default=3, ge=1, description="runs of each side, by turns")
    kept: str = Field(
        default="", description="a file in which finished sides are kept: a call that was cut off goes on behind them"
    )
    timeout: float = Field(default=900.0, gt=0, description="seconds a side may take")


def run(settings: Settings) -> Result:
    """Trains the sides by turns, each until its loss is low enough."""
    if set(settings.sides) & {"eager", "compile"}:
        require("torch", extra="parity", purpose="benchmark time_to_loss")
    text = Path(settings.text)
    if not text.is_file():
        raise DataError(f"benchmark time_to_loss: no text at '{text}'; name one with text=FILE")
    kept = Path(settings.kept) if settings.kept else None
    same = settings.model_dump(mode="json", exclude={"sides", "kept", "timeout", "rounds"})
    found: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept and kept.is_file() else {}
    if found.get("settings") != same or "rounds" not in found:
        found = {"settings": same, "rounds": []}
    rounds = found["rounds"]
    for n in range(settings.rounds):
        rounds += [{}] * (len(rounds) <= n)
        for side in settings.sides:
            if side in rounds[n]:
                continue
            rounds[n] = rounds[n] | {side: _train(side, settings, text.absolute())}
            if kept:
                kept.write_text(json.dumps(found), "utf-8")
    return _result(settings, [{side: tree[side] for side in settings.sides} for tree in rounds[: settings.rounds]])


def _result(settings: Settings, rounds: list[dict[str, dict[str, Any]]]) -> Result:
    """A row a side, and where ours is among them each peer's paired ratio; `rounds` is kept whole."""
    columns = {side: np.array([tree[side]["seconds"] for tree in rounds]) for side in settings.sides}
    rows = [
        Row(f"shakespeare (char), start to held-out loss {settings.target:g}: {side}", float(np.median(taken)), "s")
        for side, taken in columns.items()
    ]
    if "ours" not in columns:
        return Result(tuple(rows), {}, {}, {"rounds": rounds})
    found = summary({"ours": columns["ours"]} | columns, 0)
    rows += [
        Row(f"the same, {side} over ours", spread["median"], "x", 1.0 if side == "eager" else None)
        for side, spread in found["paired"].items()
    ]
    return Result(tuple(rows), {"seconds to the loss": found}, found["ratios"], {"rounds": rounds})


def _train(side: str, settings: Settings, text: Path) -> dict[str, Any]:
    """Trains one side from nothing: `seconds` and `step` at which it came to the target, and its `curve`.

    Raises:
        DataError: it ended before that, or took too long.
    """
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        changes = [f"corpus.path={text}", f"stages.0.steps={settings.steps}"]
        changes += [f"execution.eval_every={settings.eval_every}"]
        (root / "config.json").write_text(to_json(load_config("gpt/shakespeare_char", RunConfig, changes)))
        command = [sys.executable, "-m", "bertgpt_jax.benchmarks.nanogpt_peer", str(root / "config.json"), side]
        command.append(str(settings.eval_every))
        if side == "ours":
            command = [sys.executable, "-c", TRAIN, str(root / "config.json"), "--workdir", str(root / "run")]
            command += ["--platform", "cpu"]
        begun, curve, last = time.perf_counter(), [], "it said nothing"
        # else torch would find in later rounds what it compiled in the first
        with started(command, settings.timeout, TORCHINDUCTOR_CACHE_DIR=str(root / "inductor")) as process:
            for line in process.stdout:
                last = line.strip() or last
                if match := _HELD_OUT.match(line):
                    seconds, step, loss = time.perf_counter() - begun, int(match[1].replace(",", "")), float(match[2])
                    curve.append([step, loss, round(seconds, 2)])
                    if loss <= settings.target:
                        return {"seconds": seconds, "step": step, "curve": curve}
    reached = f"its losses were {[loss for _, loss, _ in curve]}" if curve else last
    raise DataError(f"'{side}' ended or was cut off before a held-out loss of {settings.target:g}: {reached}")
