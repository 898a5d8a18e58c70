"""Batches that the mesh does not divide are filled up with rows of weight 0, and nothing else changes."""

from __future__ import annotations

import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from bertgpt_jax.batches.ramp import batch_ramp, without_weight
from bertgpt_jax.commands.train import main
from bertgpt_jax.config import to_json
from bertgpt_jax.corpus.config import CharactersConfig, CorpusConfig, PositionSplit
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.parallel.sharding import place_batch
from bertgpt_jax.training import run, setup
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant

SIZES = dict(vocab_size=32, max_positions=16, hidden_size=16, num_heads=2, intermediate_size=32, num_layers=1)


def stage(**changes) -> StageConfig:
    shape = dict(name="only", steps=6, sequence_length=16, batch_size=16, batch_ramp=((0, 3), (3, 16)))
    return StageConfig(**shape | {"schedule": Constant(peak=1e-2)} | changes)


def test_gpt3s_first_batches_on_256_shards() -> None:
    """32k tokens are 16 rows of 2,048: 240 of 256 rows have no weight; full batches stay as they are."""
    ramp = batch_ramp(((0, 16), (4e9, 512), (8e9, 1024), (12e9, 1536)), 2048)
    gpt3 = stage(sequence_length=2048, batch_size=1536, batch_ramp=ramp)
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 256, "pipe": 1, "context": 1, "tensor": 4})
    program = types.SimpleNamespace(mesh=mesh)
    shapes = [setup.shape_config(program, gpt3, segment) for segment in gpt3.ramp().segments]
    assert [(shape.batch_size, shape.microbatches) for shape in shapes] == [(256, 1), (512, 1), (1024, 1), (1536, 1)]
    assert [segment.batch_size for segment in gpt3.ramp().segments] == [16, 512, 1024, 1536], "what is counted"


def test_only_weights_change() -> None:
    batch = {"tokens": np.arange(6).reshape(3, 2), "weights": np.ones((3, 2)), "next_weights": np.ones(3)}
    filled = without_weight(batch, np.array([False, False, True]))
    assert filled["tokens"] is batch["tokens"] and filled["weights"].tolist() == [[1, 1], [1, 1], [0, 0]]
    assert filled["next_weights"].tolist() == [1, 1, 0] and batch["weights"].all(), "the original stays"
    assert without_weight(batch, np.zeros(3, bool)) is batch


@pytest.mark.parametrize("kind", ["bert", pytest.param("gpt", marks=pytest.mark.slow)])
def test_a_filled_step_is_the_step(kind: str) -> None:
    """3 rows on one device and 3 of 8 rows on eight, dropout on: the same loss, gradients and parameters."""
    model, objective = (BertConfig, MaskedLMNSP) if kind == "bert" else (GptConfig, CausalLM)
    config = RunConfig(
        corpus=CorpusConfig(path="unused"),
        model=model(**SIZES),
        objective=objective(),
        stages=(stage(),),
        execution=ExecutionConfig(compute=ComputeConfig(unroll_layers=False)),
    )
    rng, batch = np.random.default_rng(0), {}
    for name, leaf in config.objective.abstract_batch(3, 16).items():
        batch[name] = rng.integers(0, 2, leaf.shape).astype(leaf.dtype)
    batch["positions"][:] = np.arange(16)
    found = []
    for devices in (1, 8):
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        program = setup.make_program(config, mesh)
        shape = setup.shape_config(program, config.stages[0], config.stages[0].ramp().segments[0])
        numbers = np.arange(shape.batch_size)
        rows = {name: array[np.minimum(numbers, 2)] for name, array in batch.items()}
        placed = place_batch(without_weight(rows, numbers >= 3), mesh, shape.batch_size)
        state, metrics = setup.lower_train_step(program, shape).compile()(program.init(), placed)
        found.append((jax.device_get(state["params"]), {name: float(value) for name, value in metrics.items()}))
        assert shape.batch_size == {1: 3, 8: 8}[devices]
    (params, metrics), (filled, filled_metrics) = found
    assert filled_metrics == pytest.approx(metrics, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, filled)


@pytest.mark.slow
def test_a_run_whose_ramp_no_mesh_divides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The rows of metrics.jsonl on eight devices are those on one."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    config = RunConfig(
        corpus=CorpusConfig(
            path=str(tmp_path / "text.txt"),
            held_out=PositionSplit(fraction=0.1),
            tokenizer=CharactersConfig(),
            workers=0,
        ),
        model=GptConfig(**SIZES | {"vocab_size": None}),
        objective=CausalLM(),
        stages=(stage(),),
        execution=ExecutionConfig(compute=ComputeConfig(unroll_layers=False), log_every=1, eval_batches=1),
    )
    (tmp_path / "config.json").write_text(to_json(config))
    rows = {}
    for devices in (1, 8):
        monkeypatch.setattr(run, "make_mesh", lambda mesh, n=devices: make_mesh(mesh, jax.devices()[:n]))
        assert main([str(tmp_path / "config.json"), "--workdir", str(tmp_path / str(devices))]) == 0
        rows[devices] = [json.loads(line) for line in (tmp_path / str(devices) / "metrics.jsonl").open()]
        assert ("3 rows are filled up to 8 with rows of weight 0" in capsys.readouterr().out) == (devices == 8)
    assert [row["train/tokens_seen"] for row in rows[8]] == [48, 96, 144, 400, 656, 912]
    for one, eight in zip(rows[1], rows[8], strict=True):
        assert eight == pytest.approx(one, rel=2e-5)
