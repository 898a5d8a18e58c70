"""What a run would be, from its config alone: parameters, FLOPs, bytes a device, shardings. Nothing is compiled."""

from __future__ import annotations

import jax

from bertgpt_jax.parallel.mesh import make_mesh
from bertgpt_jax.parallel.sharding import bytes_per_device, flatten
from bertgpt_jax.training.ahead import assume_vocabulary
from bertgpt_jax.training.metrics import short_number
from bertgpt_jax.training.run_config import RunConfig
from bertgpt_jax.training.setup import Program, make_program, stage_state


def describe(config: RunConfig) -> str:
    """The report of `--dry-run`, on the mesh of this machine's devices.

    A vocabulary left to the tokenizer is taken to be as large as the tokenizer's config allows.

    Raises:
        ConfigError: whatever would stop the run before its data is read.
    """
    program = make_program(assume_vocabulary(config), make_mesh(config.execution.mesh))
    sizes = ", ".join(f"{axis}={size}" for axis, size in program.mesh.shape.items())
    lines = [
        f"model        {config.model.kind}, {program.parameters:,} parameters, "
        f"vocabulary {program.config.model.vocab_size:,}"
        + ("" if config.model.vocab_size else " (assumed; the tokenizer decides)"),
        f"mesh         {sizes} on {jax.device_count()} x {jax.devices()[0].device_kind}",
        *_matmul(program),
        *_pipeline(program),
        *_bytes(program),
        *[line for stage in program.config.stages for line in _stage(program, stage)],
        "parameters   (shape, logical sharding over the mesh)",
    ]
    for name, leaf in flatten(program.abstract_state["params"]).items():
        lines.append(f"  {name:44} {str(leaf.shape):24} {tuple(leaf.sharding.spec)}")
    return "\n".join(lines)


def _matmul(program: Program) -> list[str]:
    compute = program.model.compute
    emulated = ", emulated where the device has none" if compute.emulate else ""
    rest = f"the rest in {compute.dtype}"
    return [f"matmul       fp8: the layers' linear maps{emulated}; {rest}"] if compute.matmul == "fp8" else []


def _pipeline(program: Program) -> list[str]:
    laid, rows = program.model.pipeline, []
    for stage in program.config.stages if laid else ():
        count = laid.microbatches(stage.batch_size // stage.microbatches)
        rows.append(
            f"pipeline     {stage.name}: {laid.stages} stages, {laid.repeats} groups of layers each, "
            f"{count} microbatches; a stage is idle {laid.idle_share(count):.0%} of its time"
        )
    return rows


def _bytes(program: Program) -> list[str]:
    rows = []
    for stage in program.config.stages:
        state = stage_state(program, stage)
        parts = {
            name: bytes_per_device(state[name], jax.tree.map(lambda x: x.sharding, state[name]))
            for name in ("params", "optimizer")
        }
        total = parts["params"] * 2 + parts["optimizer"]  # gradients lie as the parameters do
        text = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items())
        rows.append(
            f"a device     {stage.name}: {text}, gradients {parts['params'] / 2**20:,.1f} MiB; "
            f"{total / 2**20:,.1f} MiB without activations"
        )
    return rows


def _stage(program: Program, stage) -> list[str]:
    length = stage.sequence_length
    scored = program.config.objective.scored_share(length)
    model = program.config.model
    halved, full = (model.flops_per_token(length, scored, halved=h) for h in (True, False))
    tokens, ramp = stage.batch_size * length, stage.ramp()
    steps = stage.steps or (stage.tokens and ramp.batches_for(stage.tokens, lambda length: length))
    total = ramp.tokens_before(steps) if steps else 0
    lasts = f"{steps:,} steps, {total:,} tokens, {halved * total:.3g} FLOPs" if steps else f"{stage.epochs} epochs"
    return [
        f"stage        {stage.name}: {lasts}; batch {stage.batch_size} x {length} = {short_number(tokens)} tokens",
        f"             {halved / 1e9:.4g} GFLOP a token (attention in full: {full / 1e9:.4g})",
        *[
            f"             from step {s.first:,}: batch {s.batch_size} x {s.sequence_length}, after {s.tokens:,} tokens"
            for s in (ramp.segments if len(ramp.segments) > 1 else ())
        ],
    ]
