"""Tiny runs on any mesh, pipelines among them. As a program: one process of several, printing its losses as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import numpy as np

from bertgpt_jax.config import build
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.parallel import distributed, sharding
from bertgpt_jax.parallel.mesh import make_mesh
from bertgpt_jax.training.run_config import RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant
from bertgpt_jax.training.setup import Program, lower_train_step, make_program

FAST_COMPILE = {"xla_backend_optimization_level": 0}
STEPS, ROWS, LENGTH, LAYERS = 2, 16, 16, 8
SIZES = dict(vocab_size=32, max_positions=LENGTH, hidden_size=16, num_heads=2, intermediate_size=32)


def run_config(
    kind: str, mesh: dict[str, int], pipeline: dict[str, Any], microbatches: int = 1, layers: int = LAYERS, **compute
) -> RunConfig:
    """Dropout is on."""
    stage = StageConfig(
        steps=STEPS, sequence_length=LENGTH, batch_size=ROWS, microbatches=microbatches, schedule=Constant(peak=1e-3)
    )
    execution = {"mesh": {"data": 1} | mesh, "pipeline": pipeline, "compute": {"unroll_layers": False} | compute}
    settings = {
        "corpus": CorpusConfig(path="unused"),
        "model": (BertConfig if kind == "bert" else GptConfig)(**SIZES, num_layers=layers),
        "objective": MaskedLMNSP() if kind == "bert" else CausalLM(),
        "stages": (stage,),
        "execution": execution,
    }
    return build(RunConfig, settings, "test")


def program_of(config: RunConfig) -> Program:
    mesh = config.execution.mesh
    count = int(np.prod([mesh.data, mesh.fsdp, mesh.pipe, mesh.context, mesh.tensor]))
    return make_program(config, make_mesh(mesh, jax.devices()[:count]))


def batch_of(config: RunConfig, step: int) -> dict[str, np.ndarray]:
    """Random ids, uneven weights, rows of different length."""
    rng, vocabulary = np.random.default_rng(step), config.model.vocab_size
    batch = {}
    for name, leaf in config.objective.abstract_batch(ROWS, LENGTH).items():
        high = {"types": 2, "next_labels": 2, "mask_positions": LENGTH // 2}.get(name, vocabulary)
        batch[name] = rng.integers(0, high, leaf.shape).astype(leaf.dtype)
        if name.endswith("weights"):
            batch[name] = (rng.random(leaf.shape) < 0.7).astype(np.float32)
    batch["positions"][:] = np.arange(LENGTH)
    if "segments" in batch:
        batch["segments"][:] = np.arange(LENGTH) < rng.integers(LENGTH // 2, LENGTH + 1, (ROWS, 1))
    return batch


def train(config: RunConfig) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    program = program_of(config)
    step = lower_train_step(program, config.stages[0]).compile(FAST_COMPILE)
    state, rows = program.init(), []
    mine = sharding.local_rows(program.mesh, ROWS)
    for number in range(STEPS):
        batch = {name: array[mine] for name, array in batch_of(config, number).items()}
        state, metrics = step(state, sharding.place_batch(batch, program.mesh, ROWS))
        rows.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return rows


def main(kind: str, settings: str) -> None:
    """Args: the kind of model, JSON of (mesh, pipeline)."""
    distributed.initialize(distributed.from_environment(distributed.DistributedConfig()), {})
    print(json.dumps(train(run_config(kind, *json.loads(settings)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
