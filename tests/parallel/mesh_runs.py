"""Tiny runs on meshes of eight devices. As a program: five steps on every mesh as JSON, XLA's warnings on stderr."""

from __future__ import annotations

import contextlib
import json
import sys

import jax
import numpy as np

from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.layers import Embedding
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.parallel import sharding
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant
from bertgpt_jax.training.setup import lower_train_step, make_program

MESHES = {
    "one": (1, 1, 1), "8": (8, 1, 1), "2,2,2": (2, 2, 2), "1,8,1": (1, 8, 1), "4,1,2": (4, 1, 2), "1,1,8": (1, 1, 8)
}  # fmt: skip
"""(data, fsdp, tensor)."""
MICROBATCHES = {"bert": 1, "gpt": 2}
STEPS, ROWS, LENGTH = 5, 16, 16
LAYERS, HEADS = 2, 8
SIZES = dict(vocab_size=32, max_positions=LENGTH, hidden_size=16, num_heads=HEADS, intermediate_size=32)


def run_config(
    kind: str, mesh: tuple[int, int, int], layers: int = LAYERS, microbatches: int = 0, **compute
) -> RunConfig:
    data, fsdp, tensor = mesh
    stage = StageConfig(
        steps=STEPS,
        sequence_length=LENGTH,
        batch_size=ROWS,
        microbatches=microbatches or MICROBATCHES[kind],
        schedule=Constant(peak=1e-3),
    )
    return RunConfig(
        corpus=CorpusConfig(path="unused"),
        model=(BertConfig if kind == "bert" else GptConfig)(**SIZES, num_layers=layers),
        objective=MaskedLMNSP() if kind == "bert" else CausalLM(),
        stages=(stage,),
        execution=ExecutionConfig(
            mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
            compute=ComputeConfig(**{"unroll_layers": False} | compute),
        ),
    )


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


def train(kind: str, shape: tuple[int, int, int]) -> dict[str, list[float]]:
    """Loss and gradient norm of every step."""
    config = run_config(kind, shape)
    mesh = make_mesh(config.execution.mesh, jax.devices()[: int(np.prod(shape))])
    program = make_program(config, mesh)
    step = lower_train_step(program, config.stages[0]).compile()
    state, rows = program.init(), []
    for number in range(STEPS):
        state, metrics = step(state, sharding.place_batch(batch_of(config, number), mesh, ROWS))
        rows.append({name: float(value) for name, value in metrics.items()})
    return {name: [row[name] for row in rows] for name in ("loss", "grad_norm")}


@contextlib.contextmanager
def lookup_in_a_sharded_table():
    """Takes away what `Embedding` does against rematerialisation: the control that XLA's warning is seen at all."""
    kept = Embedding.__call__
    Embedding.__call__ = lambda self, ids, dtype: self.table.astype(dtype)[ids]
    try:
        yield
    finally:
        Embedding.__call__ = kept


def main(kind: str, *names: str) -> None:
    results = {name: train(kind, MESHES[name]) for name in names}
    print("control", file=sys.stderr, flush=True)
    config = run_config(kind, MESHES["2,2,2"], microbatches=1)  # with more, XLA 0.10 aborts over this control
    with lookup_in_a_sharded_table():
        lower_train_step(make_program(config, make_mesh(config.execution.mesh)), config.stages[0]).compile()
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
