"""Split sequences compiled for TPUs that are not here: memory of 131,072 tokens, transfers that wait for nothing."""

from __future__ import annotations

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.nn.ring import ring_attention
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.parallel.sharding import mesh_context
from bertgpt_jax.parallel.topology import describe
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant
from bertgpt_jax.training.setup import lower_train_step, make_program

pytestmark = [
    pytest.mark.slow,
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `libtpu`)"),
]
LENGTH = 131_072
V5E_HBM = 15.75 * 2**30


def test_blocks_travel_while_others_are_computed() -> None:
    """In the schedule for v5e:2x2, transfers start before the loop over tiles and end behind it."""
    mesh = make_mesh(MeshConfig(data=1, context=4), describe("v5e:2x2"))
    lies = NamedSharding(mesh, PartitionSpec(None, "context"))
    x = jax.ShapeDtypeStruct((16, 4096, 4, 128), jnp.bfloat16, sharding=lies)
    mask = AttentionMask(causal=True)
    with mesh_context(mesh):
        lowered = jax.jit(lambda q, k, v: ring_attention(q, k, v, mask, zigzag=True)).lower(x, x, x)
    text = lowered.compile().as_text()
    operations = re.findall(r" (collective-permute(?:-start|-done)?|while)\(", text)
    permutes = "collective-permute-start"
    first = operations.index(permutes)
    assert operations[first : first + 5] == [permutes] * 2 + ["while"] + ["collective-permute-done"] * 2, operations


@pytest.mark.timeout(900)
def test_a_gpt_of_131072_tokens_fits_v5e_16x16() -> None:
    """1.3B parameters and a position table, 16 rows on 256 chips, everything recomputed from each layer's input."""
    size = dict(num_layers=24, hidden_size=2048, num_heads=16, intermediate_size=8192)
    compute = ComputeConfig(dtype="bfloat16", context_attention="ring", remat="full", head_chunk=8192)
    config = RunConfig(
        corpus=CorpusConfig(path="unused"),
        model=GptConfig(**size, vocab_size=50304, max_positions=LENGTH, hidden_dropout=0, attention_dropout=0),
        objective=CausalLM(),
        stages=(StageConfig(steps=1, sequence_length=LENGTH, batch_size=16, schedule=Constant(peak=1e-4)),),
        execution=ExecutionConfig(mesh=MeshConfig(data=1, fsdp=16, context=16), compute=compute),
    )
    program = make_program(config, make_mesh(config.execution.mesh, describe("v5e:16x16")))
    compiled = lower_train_step(program, config.stages[0]).compile()
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    print(f"{used / 2**30:.2f} GiB a chip")
    assert used < 0.5 * V5E_HBM
    found = set(re.findall(r"(?:f32|bf16)\[([\d,]+)\]", compiled.as_text()))
    whole = {shape for shape in found if str(LENGTH) in shape.split(",")}
    assert whole <= {f"{LENGTH},128", f"{LENGTH},2048"}, "nothing but the position table is as long as the sequence"
