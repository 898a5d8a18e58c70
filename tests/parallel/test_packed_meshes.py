"""Packed rows on a mesh: labels and positions by segment lie as all else does, and the step is that of one device."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.packing import PackedDocuments, PackedPairs
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.corpus.view import InMemoryCorpus
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.parallel import sharding
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant
from bertgpt_jax.training.setup import lower_train_step, make_program

FAST_COMPILE = {"xla_backend_optimization_level": 0}
T, ROWS, V = 32, 8, 32
SIZES = dict(vocab_size=V, max_positions=T, num_layers=1, hidden_size=16, num_heads=2, intermediate_size=32)
OBJECTIVES = {
    "pairs": (BertConfig(**SIZES), MaskedLMNSP(examples=PackedPairs(max_segments=4))),
    "causal": (GptConfig(**SIZES), CausalLM(examples=PackedDocuments())),
}


def train(kind: str, shape: tuple[int, int, int]) -> list[dict[str, float]]:
    """Metrics of two steps; dropout is on."""
    model, objective = OBJECTIVES[kind]
    data, fsdp, tensor = shape
    stage = StageConfig(
        steps=2, sequence_length=T, batch_size=ROWS, microbatches=2 if kind == "pairs" else 1, schedule=Constant()
    )
    compute = ComputeConfig(unroll_layers=False)
    execution = ExecutionConfig(mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor), compute=compute)
    config = RunConfig(
        corpus=CorpusConfig(path="unused"), model=model, objective=objective, stages=(stage,), execution=execution
    )
    rng = np.random.default_rng(0)
    documents = [[rng.integers(6, V, n).tolist() for n in rng.integers(1, 6, rng.integers(2, 5))] for _ in range(90)]
    rows = Dataset(
        InMemoryCorpus(documents, V), objective.examples, objective.masking, sequence_length=T, batch_size=ROWS
    )
    mesh = make_mesh(config.execution.mesh, jax.devices()[: int(np.prod(shape))])
    program = make_program(config, mesh)
    step = lower_train_step(program, stage).compile(FAST_COMPILE)
    state, found = program.init(), []
    for n in range(2):
        mine = rows.batch(n, sharding.local_rows(mesh, ROWS))
        assert mine["segments"].max() > 2
        state, metrics = step(state, sharding.place_batch(mine, mesh, ROWS))
        found.append({name: float(value) for name, value in metrics.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_packed_steps_equal_one_devices(kind: str) -> None:
    alone = train(kind, (1, 1, 1))
    assert alone[0]["loss"] != alone[1]["loss"]
    for one, other in zip(alone, train(kind, (2, 2, 2)), strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
