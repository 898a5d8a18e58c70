"""Benchmark `hlo`: what must hold of train steps compiled for TPUs that are not here, read from their programs.

No fp32 logits under bf16; nothing exchanged while microbatches add up; with the optimizer's state shared (ZeRO-1), no
gradient summed whole; the state updated in its own memory; one attention kernel a layer in each direction.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal

import jax
from pydantic import Field

from bertgpt_jax.benchmarks.harness import Result, Row
from bertgpt_jax.config import Config, build
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.parallel.hlo_text import Computations, Line, array_bytes, arrays, called, in_loops, parse
from bertgpt_jax.parallel.sharding import bytes_per_device
from bertgpt_jax.parallel.topology import describe
from bertgpt_jax.training.ahead import lower_step
from bertgpt_jax.training.run_config import RunConfig


class Settings(Config):
    """Settings of the benchmark; rows are those of one device."""

    topologies: tuple[str, ...] = Field(default=("v5e:4x4", "v6e:16x16"), min_length=1)
    models: tuple[Literal["gpt", "bert"], ...] = ("gpt", "bert")
    layers: int = Field(default=2, ge=1)
    hidden: int = Field(default=256, ge=8)
    heads: int = Field(default=4, ge=1)
    vocabulary: int = Field(default=8192, ge=2)
    length: int = Field(default=256, ge=8)
    rows: int = Field(default=4, ge=2)
    microbatches: int = Field(default=2, ge=2)


def run(settings: Settings) -> Result:
    """Compiles a step of each model and counts what its program holds."""
    rows, facts = [], {}
    for topology, kind in itertools.product(settings.topologies, settings.models):
        name = f"{kind.upper()} L{settings.layers} on {topology}"
        found = facts[name] = examine(settings, kind, topology)
        rows += [
            Row(f"{name}: fp32 arrays as large as the logits", found["logits_fp32"], "", most=0),
            Row(f"{name}: collectives inside the accumulation loop", found["collectives_in_loops"], "", most=0),
            Row(f"{name}: share of gradients summed whole, ZeRO-1", found["share_summed_whole"], "", most=0.05),
            Row(f"{name}: state updated in place, share of its bytes", found["share_in_place"], "", least=1.0),
            Row(f"{name}: attention kernels a layer, forward", found["kernels_forward"], "", least=1, most=1),
            Row(f"{name}: attention kernels a layer, backward", found["kernels_backward"], "", least=1, most=1),
        ]
    return Result(tuple(rows), {}, facts=facts)


def step_config(settings: Settings, kind: str, devices: int) -> RunConfig:
    """A run of a small model in bf16 that accumulates and shares the optimizer's state."""
    sizes: dict[str, Any] = dict(
        vocab_size=settings.vocabulary, max_positions=settings.length, num_layers=settings.layers,
        hidden_size=settings.hidden, num_heads=settings.heads, intermediate_size=4 * settings.hidden,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    stage = dict(
        steps=10, sequence_length=settings.length, batch_size=settings.rows * devices,
        microbatches=settings.microbatches, schedule=dict(kind="constant", peak=1e-4),
    )  # fmt: skip
    tree = dict(
        corpus=CorpusConfig(path="unused"), model=(GptConfig if kind == "gpt" else BertConfig)(**sizes),
        objective=CausalLM() if kind == "gpt" else MaskedLMNSP(), stages=(stage,),
        execution=dict(compute=dict(dtype="bfloat16"), shard_optimizer=True),
    )  # fmt: skip
    return build(RunConfig, tree, "benchmark")


def examine(settings: Settings, kind: str, topology: str) -> dict[str, float]:
    """Counts of what `run` holds against its bars."""
    devices = describe(topology)
    lowered = lower_step(step_config(settings, kind, len(devices)), devices)
    compiled = lowered.step.compile()
    computations, _ = parse(compiled.as_text())
    lines = [(where, line) for where, found in computations.items() for line in found]
    objective, rows = lowered.program.config.objective, settings.rows // settings.microbatches
    scored = rows * max(round(objective.scored_share(settings.length) * settings.length), 1)
    inside = in_loops(computations)
    kernels = [line.name for where, line in lines if "tpu_custom_call" in line.rest and where in inside]
    state = lowered.program.abstract_state
    bytes_of_state = bytes_per_device(state, jax.tree.map(lambda x: x.sharding, state))
    return {
        "logits_fp32": sum(scored * settings.vocabulary in sizes for sizes in fp32_arrays(computations)),
        "collectives_in_loops": sum(line.collective is not None for where, line in lines if where in inside),
        "share_summed_whole": bytes_summed_whole(computations) / (4 * lowered.program.parameters),
        "reduce_scatters": sum(line.collective == "reduce-scatter" for _, line in lines),
        "share_in_place": compiled.memory_analysis().alias_size_in_bytes / bytes_of_state,
        "kernels_forward": sum("fwd" in name for name in kernels),
        "kernels_backward": sum("fwd" not in name for name in kernels),
    }


def bytes_summed_whole(computations: Computations) -> int:
    """Bytes of what all-reduces sum and leave whole on every device.

    Two kinds are none of these, as libtpu compiles: the sum inside a fusion `all-reduce-scatter`, of which each device
    keeps its part, and small parts that are gathered by adding them up, each laid into zeros at its place.
    """
    lines = {line.name: line for found in computations.values() for line in found}
    total = 0
    for where, found in computations.items():
        for line in found:
            if line.collective == "all-reduce" and not where.startswith("all-reduce-scatter"):
                each = zip(line.operands, array_bytes(line.shape), strict=True)
                total += sum(size for name, size in each if not _laid_into_zeros(name, computations, lines))
    return total


def _laid_into_zeros(name: str, computations: Computations, lines: dict[str, Line]) -> bool:
    """Whether an instruction, or the fusion whose result it is, lays something into an array of equal numbers."""
    made, index = lines[name], 0
    if made.opcode == "get-tuple-element":
        made, index = lines[made.operands[0]], int(made.rest.rpartition("index=")[2].split(",")[0])
    outside = made.operands
    if made.opcode == "fusion":
        made = computations[called(made)[0]][-1]
        made = lines[made.operands[index]] if made.opcode == "tuple" else made
    if made.opcode != "dynamic-update-slice":
        return False
    into = lines[made.operands[0]]
    if into.opcode == "parameter":
        into = lines[outside[int(into.rest.partition(")")[0])]]
    return into.opcode == "broadcast"


def fp32_arrays(computations: Computations) -> Iterator[list[int]]:
    """Element counts of the fp32 results of each instruction that is an array in memory, not a step inside a fusion."""
    fused = {name for lines in computations.values() for x in lines if x.opcode == "fusion" for name in called(x)}
    for where, lines in computations.items():
        if where not in fused:
            yield from ([n for dtype, n in arrays(line.shape) if dtype == "f32"] for line in lines)
