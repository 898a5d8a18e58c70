"""Benchmark `convergence`: held-out losses of training with each technique beside plain training, on several seeds.

Plain is fp32, attention by XLA, nothing recomputed, layers unrolled. Start, batches and held-out rows of a seed are the
same for all. Every technique has to stay within the seeds' spread (a standard deviation of plain runs), and what only
reorders sums, or is promised to stay nearer, within a bar of its own.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import Field

from bertgpt_jax.benchmarks.convergence_cases import CASES, PLAIN, Kind, Technique, techniques, unpacked
from bertgpt_jax.benchmarks.convergence_picture import draw
from bertgpt_jax.benchmarks.harness import Result, Row
from bertgpt_jax.benchmarks.time_to_loss import SAMPLE
from bertgpt_jax.config import Config, load_config
from bertgpt_jax.corpus.builder import open_corpus
from bertgpt_jax.errors import ConfigError, DataError
from bertgpt_jax.evaluation import held_out
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.parallel.sharding import place_batch
from bertgpt_jax.shapes import Params
from bertgpt_jax.training import setup
from bertgpt_jax.training.run_config import RunConfig, with_steps, with_vocabulary
from bertgpt_jax.training.step import init_state

PLAINLY = Technique("plain", most=None)
BLOCK = 10
"""Steps whose mean training loss is a point of a curve."""


class Settings(Config):
    """Settings of the benchmark."""

    gpt_text: str = Field(default=str(SAMPLE), description="for configs/gpt/shakespeare_char.py")
    bert_text: str = Field(default="../shared/data/lm/enwiki-sample", description="documents of sentences")
    models: tuple[Kind, ...] = Field(default=("gpt", "bert"), min_length=1)
    techniques: tuple[str, ...] = Field(default=(), description="those whose name has one of these in it; none: all")
    seeds: int = Field(default=3, ge=2)
    steps: int = Field(default=500, ge=10, description="of bf16 and its plain runs")
    gpt_steps: int = Field(default=150, ge=10, description="of the GPT with the others, and their plain runs")
    bert_steps: int = Field(default=500, ge=10, description="the same of the BERT, a step of which takes a third")
    eval_batches: int = Field(default=50, ge=1)
    picture: str = Field(default="", description="a PNG of the curves, as differences to the plain ones")
    kept: str = Field(default="", description="a file of finished runs: a call that was cut off goes on behind them")


def run(settings: Settings) -> Result:
    """Trains everything.

    Raises:
        DataError: a text is not there.
    """
    for text in (settings.gpt_text if "gpt" in settings.models else "", settings.bert_text):
        if text and not Path(text).exists():
            raise DataError(f"benchmark convergence: no text at '{text}'; name others with gpt_text=, bert_text=")
    _two_devices()
    rows, facts, kept = [], {}, _Kept(settings)
    with tempfile.TemporaryDirectory() as directory:
        for kind in settings.models:
            trainer = Trainer(kind, settings, Path(directory), kept)
            wanted = [t for t in techniques(kind) if not settings.techniques or _named(t, settings.techniques)]
            facts[kind] = {t.name: trainer.compared(t) for t in wanted}
            rows += _rows(CASES[kind].name, wanted, facts[kind])
    if settings.picture:
        draw({CASES[kind].name: found for kind, found in facts.items()}, BLOCK, Path(settings.picture))
    return Result(tuple(rows), {}, facts=facts)


def _named(technique: Technique, parts: tuple[str, ...]) -> bool:
    return any(part in technique.name for part in parts)


def _two_devices() -> None:
    """Makes jax find two CPU devices, unless it was told how many or has started."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", 2)


def _rows(model: str, wanted: list[Technique], found: dict[str, dict[str, Any]]) -> list[Row]:
    """A row a technique; of those that only reorder sums, the README gets the one that moves most."""
    rows = []
    for technique in wanted:
        tree = found[technique.name]
        side = "above" if sum(tree["seeds_apart"]) > 0 else "below"
        how = "loss of the seed that moves most, beside" if technique.exact else f"mean loss over seeds, {side}"
        measure = f"{model}, {tree['steps']} steps, {technique.name}: {how} plain training's"
        bar = None if technique.nudged else tree["bar"]
        rows.append(Row(measure, tree["apart"], "%", most=bar, detail=technique.exact))
    exact = [found[t.name] for t in wanted if t.exact and not t.nudged]
    if exact:
        reordering = f"{len(exact)} techniques that only reorder sums"
        measure = f"{model}, {reordering}: loss of the seed that moves most, beside plain training's"
        most = min(tree["bar"] for tree in exact)
        rows.append(Row(measure, max(tree["apart"] for tree in exact), "%", most=most))
    return rows


class _Kept:
    """Finished runs in a file, if there is one."""

    def __init__(self, settings: Settings):
        self._path = Path(settings.kept) if settings.kept else None
        same = settings.model_dump(mode="json", include={"gpt_text", "bert_text", "seeds", "eval_batches"})
        found = json.loads(self._path.read_text("utf-8")) if self._path and self._path.is_file() else {}
        self._tree = found if found.get("settings") == same else {"settings": same, "runs": {}}
        self.runs: dict[str, Any] = self._tree["runs"]

    def keep(self, name: str, found: dict[str, Any]) -> None:
        """Adds a run."""
        self.runs[name] = found
        if self._path:
            self._path.write_text(json.dumps(self._tree), "utf-8")


class Trainer:
    """Trains one model in many ways, each on the same start, batches and held-out rows of a seed."""

    def __init__(self, kind: Kind, settings: Settings, directory: Path, kept: _Kept):
        self.kind, self.case, self.settings = kind, CASES[kind], settings
        self._usual_steps = settings.gpt_steps if kind == "gpt" else settings.bert_steps
        self._directory, self._kept = directory, kept
        self._config, self._drawn = functools.cache(self._make_config), functools.cache(self._draw)

    def compared(self, technique: Technique) -> dict[str, Any]:
        """`apart`: per cent between the held-out losses of a technique and plain ones, and what is behind it."""
        steps = self.settings.steps if technique.long else int(self._usual_steps * technique.share)
        plain = self._trained(PLAINLY._replace(sets=technique.sets, changes=technique.apart), technique, steps)
        mine = self._trained(technique, technique, steps)
        before, after = (np.array([seed["held_out"] for seed in found]) for found in (plain, mine))
        spread = 100 * float(before.std(ddof=1) / before.mean())
        each = 100 * (after / before - 1)
        apart = np.abs(each).max() if technique.exact else 100 * abs(after.mean() / before.mean() - 1)
        bar = spread if technique.most is None else min(spread, technique.most)
        judged = {"steps": steps, "apart": float(apart), "bar": bar, "spread": spread, "seeds_apart": each.tolist()}
        return judged | {"changes": technique.changes, "sets": technique.sets, "plain": plain, "technique": mine}

    def _trained(self, technique: Technique, data: Technique, steps: int) -> list[dict[str, Any]]:
        """Of every seed: `held_out` loss and training `losses`, means of `BLOCK` steps.

        Args:
            data: whose batches are trained on, if need be in rows of their own.
        """
        name = json.dumps([self.kind, technique.name, technique.sets, technique.changes, steps])
        if name not in self._kept.runs:
            learn, found = self._compiled(technique, data, steps), []
            for seed in range(self.settings.seeds):
                begun = time.perf_counter()
                found.append(learn(seed))
                print(
                    f"  {self.case.name}, {technique.name}, {steps} steps, seed {seed}: held-out loss "
                    f"{found[-1]['held_out']:.5f} ({time.perf_counter() - begun:.0f} s)",
                    flush=True,
                )
            self._kept.keep(name, found)
        return self._kept.runs[name]

    def _compiled(self, technique: Technique, data: Technique, steps: int) -> Callable[[int], dict[str, Any]]:
        """Seed -> what a run found."""
        config = self._config((*technique.sets, *technique.changes), 0, steps)[0]
        mesh = make_mesh(MeshConfig(), jax.devices()[: technique.devices])
        if mesh.size < technique.devices:
            raise ConfigError(f"'{technique.name}' needs {technique.devices} devices, and jax has {mesh.size}")
        program, stage = setup.make_program(config, mesh), config.stages[0]
        step = setup.lower_train_step(program, stage).compile()
        evaluate = setup.lower_eval_step(program, stage).compile()
        lies, names = jax.tree.map(lambda x: x.sharding, program.abstract_state), program.abstract_batch(stage)

        def placed(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
            batch = unpacked(batch, data.segments) if data.segments > technique.segments else batch
            return place_batch({name: batch[name] for name in names}, mesh, stage.batch_size)

        def learn(seed: int) -> dict[str, Any]:
            config, train, frozen = self._config((*data.sets, *data.changes * bool(data.segments)), seed, steps)
            params = _fitted(self._drawn(data.sets, seed), program.abstract_state["params"], technique.nudged)
            state = jax.tree.map(np.array, init_state(params, stage.optimizer.build()))  # no two share a buffer
            state = jax.tree.map(jax.device_put, state, lies)
            rows, losses = np.arange(config.stages[0].batch_size), []
            for n in range(steps):
                state, metrics = step(state, placed(train.batch(n, rows)))
                losses.append(metrics["loss"])
                if mesh.size > 1:  # steps queued on few cores may take the threads that one before them waits for
                    jax.block_until_ready(state)
            count = min(self.settings.eval_batches, frozen.eval_batches())
            sums = held_out.add_up(evaluate, state["params"], count, lambda i: placed(frozen.eval_batch(i)))
            blocks = np.array(jax.device_get(losses))[: steps // BLOCK * BLOCK].reshape(-1, BLOCK).mean(1)
            loss = held_out.means(sums, program.config.objective)["loss"]
            return {"held_out": loss, "losses": [round(float(x), 5) for x in blocks]}

        return learn

    def _make_config(self, changes: tuple[str, ...], seed: int, steps: int) -> tuple[RunConfig, Any, Any]:
        """A run's config, vocabulary and steps known; its batches, and held-out ones."""
        text = self.settings.gpt_text if self.kind == "gpt" else self.settings.bert_text
        lengths = (f"stages.0.steps={steps}", f"stages.0.schedule.warmup_steps={steps // 5}", f"seed={seed}")
        every = (f"corpus.path={text}", *lengths, *self.case.changes, *PLAIN, *changes)
        last = {change.partition("=")[0]: change for change in every}
        config = load_config(self.case.config, RunConfig, list(last.values()))
        corpus = open_corpus(config.corpus, self._directory, progress=False)
        config = with_vocabulary(config, corpus.vocab_size)
        train, frozen = setup.make_datasets(config, corpus, self._directory)[0]
        return with_steps(config, [train.rows_per_epoch]), train, frozen

    def _draw(self, sets: tuple[str, ...], seed: int) -> Params:
        """The parameters with which plain runs of a seed begin."""
        config = self._config(sets, seed, self._usual_steps)[0]
        return jax.device_get(setup.make_program(config, make_mesh(MeshConfig(), jax.devices()[:1])).init()["params"])


def _fitted(params: Params, shapes: Params, nudged: bool) -> Params:
    """Parameters with rows of zeros behind theirs, where a padded vocabulary has more.

    Args:
        nudged: all of them are the next larger numbers.
    """

    def fit(x: np.ndarray, to: jax.ShapeDtypeStruct) -> np.ndarray:
        x = np.nextafter(x, np.float32(np.inf)) if nudged else x
        return np.pad(x, [(0, more - have) for have, more in zip(x.shape, to.shape, strict=True)])

    return jax.tree.map(fit, params, shapes)
