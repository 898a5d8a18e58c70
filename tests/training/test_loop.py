"""What the loop does when the numbers go wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.commands.train import main
from bertgpt_jax.config import to_json
from bertgpt_jax.corpus.config import CharactersConfig, CorpusConfig, PositionSplit
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.training import setup
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT of one layer over characters, 40 steps."""
    directory = tmp_path_factory.mktemp("loop")
    (directory / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    config = RunConfig(
        corpus=CorpusConfig(
            path=str(directory / "text.txt"),
            held_out=PositionSplit(fraction=0.1),
            tokenizer=CharactersConfig(),
            workers=0,
        ),
        model=GptConfig(num_layers=1, hidden_size=16, num_heads=2, intermediate_size=32, max_positions=16),
        objective=CausalLM(),
        stages=(StageConfig(name="only", steps=40, sequence_length=16, batch_size=8, schedule=Constant(peak=1e-2)),),
        execution=ExecutionConfig(
            compute=ComputeConfig(unroll_layers=False), log_every=1, eval_every=20, eval_batches=2, save_every=4
        ),
    )
    (directory / "config.json").write_text(to_json(config))
    return directory / "config.json"


def read(config: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """STATUS.json and the rows of metrics.jsonl."""
    workdir = config.parent / name
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return json.loads((workdir / "STATUS.json").read_text()), rows


def nan_in(patch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Makes the loss of batches first..last not a number, as if an activation overflowed."""
    real = setup.train_step

    def train_step(state: dict, batch: dict, **rest: Any) -> Any:
        n = state["data_step"]
        bad = jnp.where((n >= first) & (n <= last), jnp.nan, 1.0)
        return real(state, batch | {"weights": batch["weights"] * bad}, **rest)

    patch.setattr(setup, "train_step", train_step)


def saved_leaves(config: Path, name: str, step: int) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    path = config.parent / name / "checkpoints" / str(step) / "state"
    return {key: np.asarray(leaf) for key, leaf in ocp.PyTreeCheckpointer().restore(path).items()}


def test_updates_that_are_not_finite_are_left_out(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan_in(monkeypatch, 6, 8)
    assert main([str(config), "stages.only.steps=20", "--workdir", str(config.parent / "skips")]) == 0
    status, rows = read(config, "skips")
    assert status["reason"] == "finished"
    assert [row["optim/skipped"] for row in rows[5:11]] == [0, 1, 2, 3, 0, 0]
    assert [row["step"] for row in rows if row["train/loss"] is None] == [7, 8, 9]
    norms = [row["optim/param_norm"] for row in rows]
    assert norms[6] == norms[7] == norms[8] == norms[9] != norms[10], "the norm is of before the update"
    leaves = saved_leaves(config, "skips", 20)
    assert (int(leaves["step"]), int(leaves["data_step"])) == (17, 20)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] and np.isfinite(rows[-1]["eval/loss"])


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_run_that_diverged(
    log_every: int, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Stops with its own exit code; the newest checkpoint is finite; so is that of a second attempt."""
    nan_in(monkeypatch, 6, 1000)
    name = f"nan{log_every}"
    command = [str(config), f"execution.log_every={log_every}", "--workdir", str(config.parent / name)]
    for _ in range(2):
        assert main(command) == 77
        error = capsys.readouterr().err.splitlines()[-1]  # the first to come prepares the corpus, and tells of it
        assert error.startswith("error: ") and "updates in a row" in error and "not finite" in error
        status, _ = read(config, name)
        assert status["reason"] == "diverged" and "updates in a row" in status["message"]
        assert 11 <= status["step"] < 20
        leaves = saved_leaves(config, name, status["latest"])
        assert all(np.isfinite(leaf).all() for leaf in leaves.values())
        assert int(leaves["step"]) <= 6
    assert not (config.parent / name / "run.lock").exists()


def test_steps_do_not_pile_up(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However rarely rows are logged, the step before the last is done when another one is begun."""
    real, waited = jax.block_until_ready, []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: (waited.append(float(x)), real(x))[1])
    workdir = config.parent / "ahead"
    rare = ["execution.log_every=100", "execution.save_every=null", "stages.only.steps=12", "execution.eval_every=null"]
    assert main([str(config), *rare, "--workdir", str(workdir)]) == 0
    plain = config.parent / "each"
    assert main([str(config), *rare[1:], "--workdir", str(plain)]) == 0
    rows = [json.loads(line)["train/loss"] for line in (plain / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and waited[:10] == pytest.approx(rows[:10])


def test_a_learning_rate_far_too_high(config: Path, capsys: pytest.CaptureFixture) -> None:
    name = "high"
    arguments = ["stages.only.schedule.peak=1e30", "--workdir", str(config.parent / name)]
    assert main([str(config), *arguments]) == 77
    assert "schedule.peak" in capsys.readouterr().err
    status, _ = read(config, name)
    assert status["reason"] == "diverged"
    leaves = saved_leaves(config, name, status["latest"])
    assert all(np.isfinite(leaf).all() for leaf in leaves.values())
