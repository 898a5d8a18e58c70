"""Benchmark `flops`: the arithmetic of a compiled, unrolled train step over the analytic formula that the MFU uses.

Nothing is run. What lies above 1 is softmax, norms, activations and the optimizer, which the formula leaves out. The
body of a loop is counted once whatever its length, so layers are unrolled and the vocabulary head is in one piece.
"""

from __future__ import annotations

from typing import Any

import jax
from pydantic import Field

from bertgpt_jax.benchmarks.harness import Result, Row
from bertgpt_jax.config import Config
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm import MaskedLM
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.training import setup
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant

LEAST, MOST = 0.97, 1.05


class Settings(Config):
    """Settings of the benchmark; the widths are those of BERT-base and GPT-2 small."""

    layers: int = Field(default=12, ge=1)
    hidden: int = Field(default=768, ge=8)
    heads: int = Field(default=12, ge=1)
    bert_vocabulary: int = Field(default=30_522, ge=110)
    gpt_vocabulary: int = Field(default=50_257, ge=2)
    bert_length: int = Field(default=128, ge=16)
    gpt_length: int = Field(default=1024, ge=8)
    tokens: int = Field(default=4096, ge=8, description="of a batch")


def run(settings: Settings) -> Result:
    """Compiles both steps and reads off their arithmetic."""
    shape = dict(
        num_layers=settings.layers, hidden_size=settings.hidden, num_heads=settings.heads,
        intermediate_size=4 * settings.hidden, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    bert = BertConfig(
        **shape, vocab_size=settings.bert_vocabulary, max_positions=settings.bert_length, next_sentence_head=False
    )
    gpt = GptConfig(**shape, vocab_size=settings.gpt_vocabulary, max_positions=settings.gpt_length)
    rows, facts = [], {}
    for model, objective, length in ((bert, MaskedLM(), settings.bert_length), (gpt, CausalLM(), settings.gpt_length)):
        found = counted(model, objective, length, max(1, settings.tokens // length))
        name = f"{model.kind.upper()} L{settings.layers} D{settings.hidden} V{model.vocab_size} S{length}"
        facts[model.kind] = found
        ratio = found["compiled"] / found["analytic"]
        rows.append(Row(f"{name}: compiled FLOPs of a step over the formula", ratio, "x", LEAST, MOST))
    return Result(tuple(rows), {}, {}, facts)


def counted(model: BertConfig | GptConfig, objective: MaskedLM | CausalLM, length: int, rows: int) -> dict[str, Any]:
    """FLOPs of one update: `compiled` and `analytic` (attention in full, as the reference path computes it)."""
    stage = StageConfig(steps=1, sequence_length=length, batch_size=rows, schedule=Constant(peak=1e-4))
    # a chunk of all positions: left open, the head would be cut on the CPU
    chunk = round(objective.scored_share(length) * length)
    compute = ComputeConfig(unroll_layers=True, attention="reference", head_chunk=chunk)
    config = RunConfig(
        corpus=CorpusConfig(), model=model, objective=objective, stages=(stage,),
        execution=ExecutionConfig(compute=compute),
    )  # fmt: skip
    program = setup.make_program(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    compiled = setup.lower_train_step(program, stage).compile().cost_analysis()["flops"]
    each = model.flops_per_token(length, objective.scored_share(length), halved=False)
    return {"compiled": compiled, "analytic": each * rows * length, "batch": [rows, length]}
