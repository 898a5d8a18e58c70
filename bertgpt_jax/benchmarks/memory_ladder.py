"""Benchmark `memory_ladder`: bytes that a train step needs beside its state, technique by technique.

The real step, compiled for a TPU that is not here. The first rungs have what the package does without: attention by XLA
and a loss by `log_softmax` and a gather, in fp32.
"""

from __future__ import annotations

import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from bertgpt_jax.benchmarks.harness import Result, Row
from bertgpt_jax.config import Config, build
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.objectives.base import is_best
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.parallel.topology import describe
from bertgpt_jax.shapes import Array, Params
from bertgpt_jax.training.ahead import lower_step
from bertgpt_jax.training.run_config import RunConfig

MIB = 2**20


class Rung(NamedTuple):
    """One technique more than the rung before.

    Attributes:
        compute: settings of `execution.compute`.
        naive: the loss by `log_softmax` and a gather.
        everywhere: BERT's head at all positions, not at the masked ones alone.
        most: bar on its bytes over those of the rung before.
    """

    name: str
    compute: dict[str, Any]
    naive: bool = False
    everywhere: bool = False
    most: float = 1.0


class Ladder(NamedTuple):
    """A model with its shapes; rows are those of one device."""

    kind: Literal["gpt", "bert"]
    sizes: dict[str, int]
    length: int
    rows: int
    chunk: int


BASE = dict(num_layers=12, hidden_size=768, num_heads=12, intermediate_size=3072)
LADDERS = {
    "small": Ladder(
        "gpt", dict(num_layers=2, hidden_size=256, num_heads=4, intermediate_size=1024, vocab_size=8192), 1024, 4, 128
    ),
    "bert": Ladder("bert", BASE | dict(vocab_size=30_522), 128, 64, 32),
    "gpt": Ladder("gpt", BASE | dict(vocab_size=50_257), 1024, 4, 128),
}
"""`bert`: BERT-base at 128 tokens, 64 rows; `gpt`: GPT-2 small at 1,024, 4 rows; `small`: two layers, compiled fast."""


class Settings(Config):
    """Settings of the benchmark."""

    topology: str = "v5e:4x4"
    ladders: tuple[Literal["small", "bert", "gpt"], ...] = Field(default=("small", "bert", "gpt"), min_length=1)


def run(settings: Settings) -> Result:
    """Climbs the ladders."""
    rows, facts = [], {}
    for name in settings.ladders:
        ladder, sizes = LADDERS[name], {}
        for rung in rungs(ladder):
            begun = time.perf_counter()
            sizes[rung.name] = size = temporary_bytes(ladder, rung, settings.topology)
            print(f"  {name}: {rung.name}: {size / MIB:,.0f} MiB ({time.perf_counter() - begun:.0f} s)", flush=True)
        rows += rows_of(name, sizes)
        facts[name] = {"bytes": sizes, **ladder._asdict()}
    return Result(tuple(rows), {}, facts=facts)


def rows_of(name: str, sizes: dict[str, int]) -> list[Row]:
    """The bytes of each rung, and how they compare with those of the rung before."""
    ladder, rows, before = LADDERS[name], [], None
    for rung in rungs(ladder):
        what, size = f"{name} S{ladder.length} B{ladder.rows}: {rung.name}", sizes[rung.name]
        rows.append(Row(what, size / MIB, "MiB", detail=before is not None))
        if before is not None:
            what += f" ({size / MIB:,.0f} MiB), over the rung before"
            rows.append(Row(what, size / before, "x", most=rung.most))
        before = size
    return rows


def rungs(ladder: Ladder) -> tuple[Rung, ...]:
    """From nothing to everything; what is set stays set."""
    kernel, chunk = {"attention": "splash"}, {"head_chunk": ladder.chunk}
    gpt = ladder.kind == "gpt"
    found = (
        Rung("attention and loss by XLA", {"attention": "reference"}, naive=True, everywhere=True),
        Rung("splash attention", kernel, naive=True, everywhere=True, most=0.9 if gpt else 1.0),
        Rung("own cross-entropy", kernel, everywhere=True, most=0.9),
        Rung("loss in chunks", kernel | chunk, everywhere=True),
        Rung("masked positions alone", kernel | {"head_chunk": 10}),
        Rung("layers recomputed", kernel | (chunk if gpt else {"head_chunk": 10}) | {"remat": "full"}, most=0.9),
    )
    return tuple(rung for rung in found if not (gpt and rung.name == "masked positions alone"))


def temporary_bytes(ladder: Ladder, rung: Rung, topology: str) -> int:
    """Of one device, beside the state and the batch."""
    config = step_config(ladder, rung, len(describe(topology)))
    objective = None
    if rung.naive:
        objective = (NaiveCausalLM if ladder.kind == "gpt" else NaiveMaskedLMNSP)(**config.objective.model_dump())
    lowered = lower_step(config, describe(topology), objective=objective)
    return lowered.step.compile().memory_analysis().temp_size_in_bytes


def step_config(ladder: Ladder, rung: Rung, devices: int) -> RunConfig:
    """The run whose step is compiled."""
    sizes = ladder.sizes | dict(max_positions=max(ladder.length, 512), hidden_dropout=0.0, attention_dropout=0.0)
    masking = {"max_predictions": ladder.length, "rate": 0.999} if rung.everywhere else {"max_predictions": 20}
    objective = {"kind": "causal_lm"} if ladder.kind == "gpt" else {"kind": "masked_lm_nsp", "masking": masking}
    tree = dict(
        corpus=CorpusConfig(path="unused"),
        model=(GptConfig if ladder.kind == "gpt" else BertConfig)(**sizes),
        objective=objective,
        stages=(
            dict(
                steps=10, sequence_length=ladder.length, batch_size=ladder.rows * devices,
                schedule=dict(kind="constant", peak=1e-4),
            ),
        ),
        execution=dict(compute={"dtype": "bfloat16"} | rung.compute),
    )  # fmt: skip
    return build(RunConfig, tree, "benchmark")


class _NaiveLoss:
    """The textbook's loss: fp32 log-probabilities of all words, and the labels' picked from them."""

    def vocabulary_sums(self, model: Any, params: Params, x: Array, labels: Array, weights: Array) -> tuple:
        """As `VocabularyLoss.vocabulary_sums`."""
        logits = model.apply({"params": params}, x, method="logits").astype(jnp.float32)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * weights), jnp.sum(is_best(logits, labels) * weights)


class NaiveCausalLM(_NaiveLoss, CausalLM):
    """`CausalLM` with that loss."""


class NaiveMaskedLMNSP(_NaiveLoss, MaskedLMNSP):
    """`MaskedLMNSP` with that loss."""
