"""Benchmark `checkpoint`: the wall time that training loses to a save, and how long the bytes take to be on disk.

Lost is the call plus what the next steps take longer than the mean of as many before it and after the save. A whole
save, nothing else running, is held against a plain write of the same number of bytes to the same disk, flushed to it as
checkpoints are.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from pydantic import Field

from bertgpt_jax.benchmarks.harness import Result, Row, Side, compare
from bertgpt_jax.config import Config
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.training import setup, storage
from bertgpt_jax.training.checkpoint import Checkpoints
from bertgpt_jax.training.niceness import let_files_wait
from bertgpt_jax.training.run_config import RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant

LOST_SECONDS = 1.0
OVER_RAW = 1.3
BLOCK = 64 << 20


class Settings(Config):
    """Settings of the benchmark; the state is that of GPT-2 small with AdamW, 1.5 GB of random bits."""

    layers: int = Field(default=12, ge=1)
    hidden: int = Field(default=768, ge=8)
    heads: int = Field(default=12, ge=1)
    vocabulary: int = Field(default=50_257, ge=2)
    length: int = Field(default=64, ge=8)
    steps: int = Field(default=10, ge=1, description="after a save")
    rounds: int = Field(default=7, ge=1)
    directory: str = Field(default="", description="where to save; '' is a temporary one")


def run(settings: Settings) -> Result:
    """Trains with and without saves by turns, then saves and writes by turns."""
    let_files_wait()  # as every run does
    with contextlib.ExitStack() as stack:
        root = Path(settings.directory or stack.enter_context(tempfile.TemporaryDirectory()))
        training = _Training(settings)
        checkpoints = Checkpoints(epath.Path(root.absolute() / "run"), keep=1)
        stack.callback(checkpoints.close)
        beside = _beside_training(training, checkpoints, settings)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(training.state))
        alone = _beside_a_write(training, checkpoints, root, size, settings)
        facts = beside | {
            "state_bytes": size,
            "bytes_on_disk": sum(path.stat().st_size for path in (root / "run").rglob("*") if path.is_file()),
            "filesystem": storage.filesystem(epath.Path(root.absolute())),
        }
    seconds = {name: spread["median"] for name, spread in alone["seconds"].items()}
    shape = f"state of {size / 1e9:.2f} GB"
    rows = (
        Row(
            f"{shape}: lost to a save, its call and the next {settings.steps} steps",
            facts["lost"],
            "s",
            most=LOST_SECONDS,
        ),
        Row(f"{shape}: the call of it", facts["call"], "s"),
        Row(f"{shape}: a whole save, nothing beside it", seconds["save"], "s"),
        Row(
            f"{shape}: the same over a plain write of as many bytes",
            1 / alone["paired"]["write"]["median"],
            "x",
            most=OVER_RAW,
        ),
    )
    return Result(rows, {"alone": alone}, {"write": seconds["write"] / seconds["save"]}, facts)


class _Training:
    """A train step on one row, and a state whose moments are as random as those of a model that has trained."""

    def __init__(self, settings: Settings):
        model = GptConfig(
            num_layers=settings.layers, hidden_size=settings.hidden, num_heads=settings.heads,
            intermediate_size=4 * settings.hidden, vocab_size=settings.vocabulary, max_positions=settings.length,
            hidden_dropout=0.0, attention_dropout=0.0,
        )  # fmt: skip
        stage = StageConfig(
            steps=1_000_000, sequence_length=settings.length, batch_size=1, schedule=Constant(peak=1e-6)
        )
        config = RunConfig(corpus=CorpusConfig(), model=model, objective=CausalLM(), stages=(stage,))
        program = setup.make_program(config, make_mesh(MeshConfig(), jax.devices()[:1]))
        self._step = setup.lower_train_step(program, stage).compile()
        self.state = _randomised(program.init())
        shapes = program.abstract_batch(stage)
        rng = np.random.default_rng(0)
        self._batch = {
            name: jax.device_put(rng.integers(0, 2, x.shape).astype(x.dtype), x.sharding) for name, x in shapes.items()
        }

    def run(self, steps: int) -> float:
        """Seconds that `steps` updates take."""
        begun = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self._step(self.state, self._batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - begun


def _randomised(state: dict[str, Any]) -> dict[str, Any]:
    """The state with every floating-point array drawn anew, positive and small, so that the updates stay finite."""
    key = jax.random.key(1)

    def draw(index: int, leaf: jax.Array) -> jax.Array:
        if not np.issubdtype(leaf.dtype, np.floating):
            return leaf
        return 1e-3 * jax.random.uniform(jax.random.fold_in(key, index), leaf.shape, leaf.dtype)

    leaves, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(tree, [draw(i, leaf) for i, leaf in enumerate(leaves)])


def _beside_training(training: _Training, checkpoints: Checkpoints, settings: Settings) -> dict[str, Any]:
    """Medians of what a save takes from training, and every round's seconds."""
    training.run(3)
    checkpoints.save(training.state, 0, {"stage": "only", "metrics": {}})  # compiles
    checkpoints.wait()
    rounds = []
    before = training.run(settings.steps)
    for n in range(settings.rounds):
        begun = time.perf_counter()
        checkpoints.save(training.state, n + 1, {"stage": "only", "metrics": {}})
        call = time.perf_counter() - begun
        disturbed = training.run(settings.steps)
        checkpoints.wait()
        after = training.run(settings.steps)
        lost = call + disturbed - (before + after) / 2
        rounds.append({"call": call, "before": before, "disturbed": disturbed, "after": after, "lost": lost})
        before = after
    return {name: float(np.median([found[name] for found in rounds])) for name in rounds[0]} | {"rounds": rounds}


def _beside_a_write(
    training: _Training, checkpoints: Checkpoints, root: Path, size: int, settings: Settings
) -> dict[str, Any]:
    """Seconds of a whole save and of a plain write, by turns."""
    block = np.random.default_rng(0).bytes(BLOCK)
    saved = [settings.rounds]

    def save(_: None) -> None:
        saved[0] += 1
        checkpoints.save(training.state, saved[0], {"stage": "only", "metrics": {}})
        checkpoints.wait()

    def write(_: None) -> None:
        path = root / "plain"
        with open(path, "wb", buffering=0) as file:
            for _ in range(size // BLOCK):
                file.write(block)
            file.write(block[: size % BLOCK])
            os.fsync(file.fileno())
        path.unlink()

    return compare([Side("save", lambda: None, save), Side("write", lambda: None, write)], settings.rounds, warmup=1)
