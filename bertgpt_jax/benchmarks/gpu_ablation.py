"""Benchmark `gpu_ablation`: what each technique gives a training step on one GPU, beside what was predicted.

The real step with one technique more in every rung, on a batch that lies on the device. What the package has no setting
for is taken out of it while a rung is compiled: the plain layer norm, projections as one product, the textbook's loss.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from bertgpt_jax.benchmarks import cpu_bert, cpu_gpt
from bertgpt_jax.benchmarks.gpu_cases import CASES, Case, Trial, run_config
from bertgpt_jax.benchmarks.gpu_sides import short, timed
from bertgpt_jax.benchmarks.gpu_step import HELD_TO
from bertgpt_jax.benchmarks.harness import Result, Row, summary
from bertgpt_jax.benchmarks.memory_ladder import NaiveCausalLM, NaiveMaskedLMNSP
from bertgpt_jax.config import Config, build
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn import blocks, layers
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.shapes import Array, Hidden
from bertgpt_jax.training import memory
from bertgpt_jax.training.ahead import lower_step
from bertgpt_jax.training.run_config import RunConfig, with_changes

MISS = 0.15
"""How far a gain may be from what was predicted."""
WARMUP = 3


class Rung(NamedTuple):
    """One technique more than the rung before.

    Attributes:
        predicted: milliseconds of a step on one H200; None where nothing was predicted.
        compute: settings of `execution.compute`.
        naive_loss: by `log_softmax` and a gather; plain_norm: differentiated by jax; fused: q, k and v as one product
            that is then split; everywhere: BERT's head at all positions.
    """

    name: str
    predicted: float | None
    compute: dict[str, Any]
    naive_loss: bool = False
    plain_norm: bool = False
    fused: bool = False
    everywhere: bool = False


KERNEL, GELU = {"attention": "auto"}, {"attention": "auto", "remat": "gelu"}
LADDERS: dict[str, tuple[Rung, ...]] = {
    "gpt2": (
        Rung("nothing", 199, {"attention": "reference"}, naive_loss=True, plain_norm=True, fused=True),
        Rung("fused attention", 147, KERNEL, naive_loss=True, plain_norm=True, fused=True),
        Rung("own cross-entropy", 130, KERNEL, plain_norm=True, fused=True),
        Rung("own layer norm", 126.5, KERNEL, fused=True),
        Rung("q, k, v as three products", 123.2, KERNEL),
        Rung("GELU recomputed", 118, GELU),
        Rung("loss in chunks", 119, GELU | {"head_chunk": 128}),
        Rung("layers recomputed", 150, KERNEL | {"head_chunk": 128, "remat": "full"}),
    ),
    "bert_base": (
        Rung("head everywhere", 114, KERNEL, naive_loss=True, plain_norm=True, fused=True, everywhere=True),
        Rung("masked positions alone", 89, KERNEL, naive_loss=True, plain_norm=True, fused=True),
        Rung("own loss, norms, products, GELU", 82, GELU),
    ),
}
"""GPT-2 124M at 1,024 tokens, 64 rows; BERT-base at 128, 512 rows. Predictions are read off programs compiled for an
H200 without one: 650 TFLOP/s in matrix products, 85% of 4.3 TB/s elsewhere. That of the last rung of the GPT is what
recomputing costs the 1.5B model, 27%."""


class Settings(Config):
    """Settings of the benchmark."""

    ladders: tuple[Literal["gpt2", "bert_base"], ...] = Field(default=("gpt2", "bert_base"), min_length=1)
    steps: int = Field(default=30, ge=2, description="timed, of each rung")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    minutes: float = Field(default=3.0, gt=0, description="no rung is begun later than this")
    trial: Trial = Trial()


def run(settings: Settings) -> Result:
    """Climbs the ladders.

    Raises:
        ConfigError: published sizes on CPUs.
    """
    needed = ("layers", "hidden", "heads", "length", "rows")
    if jax.default_backend() == "cpu" and any(getattr(settings.trial, name) is None for name in needed):
        raise ConfigError(
            "gpu_ablation at published sizes needs a GPU and jax sees none; for a trial on CPUs give "
            "trial.layers=2 trial.hidden=64 trial.heads=2 trial.vocabulary=512 trial.length=128 trial.rows=4"
        )
    begun, rows, times, facts = time.perf_counter(), [], {}, {}
    held = settings.trial.is_full and jax.devices()[0].device_kind.startswith(HELD_TO)
    for name in settings.ladders:
        case = settings.trial.of(CASES[name])
        found: dict[str, Any] = {}
        for rung in LADDERS[name]:
            if time.perf_counter() - begun > 60 * settings.minutes:
                found[rung.name] = {"error": f"left out: {settings.minutes:g} minutes were over"}
            else:
                found[rung.name] = _measured(case, rung, settings)
            taken = found[rung.name].pop("times", None)
            if taken is not None:
                times[f"{name}: {rung.name}"] = summary({"ours": taken}, WARMUP)
        label = case.label if settings.trial.is_full else f"trial of {name},"
        rows += rows_of(f"{label} T={case.length} B={case.rows}", LADDERS[name], found, held)
        facts[name] = found
    return Result(tuple(rows), times, facts=facts)


def rows_of(shape: str, rungs: tuple[Rung, ...], found: dict[str, Any], held: bool) -> list[Row]:
    """Milliseconds of each rung and its gain; writes predictions, and whether one is missed, beside what was found."""
    rows, before = [], None
    for rung in rungs:
        seen = found[rung.name]
        seen["predicted_ms"] = rung.predicted
        if "ms" not in seen:
            rows.append(Row(f"{shape}: {rung.name}: FAILED: {seen['error'][:80]}", 0.0, "ms"))
            before = None
            continue
        rows.append(Row(f"{shape}: {rung.name}", seen["ms"], "ms"))
        if before is not None:
            gain, predicted = found[before.name]["ms"] / seen["ms"], before.predicted / rung.predicted
            least, most = (predicted * (1 - MISS), predicted * (1 + MISS)) if held else (None, None)
            rows.append(Row(f"{shape}: {rung.name}, gain (predicted {predicted:.3g}x)", gain, "x", least, most))
            seen |= {"gain": gain, "predicted_gain": predicted, "missed": abs(gain / predicted - 1) > MISS}
        before = rung
    return rows


# ---------------------------------------------------------------- one rung


class OnOneBatch:
    """The rung's step, over and over on one batch (a `gpu_sides.Stepper`).

    Attributes:
        bytes: that a step takes.
        loss: of the first update.
    """

    def __init__(self, case: Case, rung: Rung, dtype: str):
        config, device = step_config(case, rung, dtype), jax.devices()[:1]
        objective = None
        if rung.naive_loss:
            naive = NaiveCausalLM if case.kind == "gpt" else NaiveMaskedLMNSP
            objective = naive(**config.objective.model_dump())
        jax.clear_caches()  # a trace of the rung before would be taken for this one's
        with without(rung):
            lowered = lower_step(config, device, objective=objective)
        self._step = lowered.step.compile()
        self.bytes = memory.step_bytes(self._step)
        self._state = lowered.program.init()
        batch = make_batch(case, rung)
        shapes = lowered.program.abstract_batch(lowered.stage)
        self._batch = {name: jax.device_put(batch[name].astype(x.dtype), x.sharding) for name, x in shapes.items()}
        self.loss = float(self.update())

    def update(self) -> Array:
        """Queues an update."""
        self._state, metrics = self._step(self._state, self._batch)
        return metrics["loss"]

    def wait(self, handle: Array) -> None:
        """Returns when the update is done."""
        handle.block_until_ready()


def _measured(case: Case, rung: Rung, settings: Settings) -> dict[str, Any]:
    """`ms`, `loss`, `bytes`, `times` of a rung; `error` if it failed."""
    begun, found = time.perf_counter(), {}
    try:
        side = OnOneBatch(case, rung, settings.dtype)
        found |= {"loss": side.loss, "bytes": side.bytes}
        timed(side, WARMUP)
        times = timed(side, settings.steps)
        found |= {"times": times, "ms": 1e3 * float(np.median(times))}
    except Exception as error:  # noqa: BLE001 (out of memory, most likely: the other rungs go on)
        found["error"] = short(error)
    side = None
    gc.collect()
    said = f"{found['ms']:.1f} ms" if "ms" in found else f"FAILED: {found['error']}"
    print(f"  {case.label}: {rung.name}: {said} ({time.perf_counter() - begun:.0f} s)", flush=True)
    return found


def step_config(case: Case, rung: Rung, dtype: str) -> RunConfig:
    """The run whose step is compiled."""
    config = run_config(case, build(ComputeConfig, {"dtype": dtype, **_fitting(case, rung.compute)}, "rung"))
    if not rung.everywhere:
        return config
    masking = {"max_predictions": case.length, "rate": 0.999}
    objective = config.objective.model_dump(mode="json")
    return with_changes(config, {"objective": objective | {"masking": objective["masking"] | masking}})


def _fitting(case: Case, compute: dict[str, Any]) -> dict[str, Any]:
    """The settings, with chunks no longer than the rows of a trial."""
    chunk = compute.get("head_chunk")
    return compute if chunk is None else compute | {"head_chunk": min(chunk, case.length)}


def make_batch(case: Case, rung: Rung) -> dict[str, np.ndarray]:
    """Random tokens."""
    sizes = dict(vocabulary=case.vocabulary, length=case.length, rows=case.rows)
    if case.kind == "gpt":
        return cpu_gpt.make_batch(cpu_gpt.Settings(**sizes))
    masked = MaskedLMNSP(masking=run_config(case, ComputeConfig()).objective.masking).scored_share(case.length)
    batch = cpu_bert.make_batch(cpu_bert.Settings(**sizes, masked=masked))
    return cpu_bert.every_position(batch) if rung.everywhere else batch


# ---------------------------------------------------------------- what is taken out


@contextlib.contextmanager
def without(rung: Rung) -> Iterator[None]:
    """What is traced meanwhile has the plain layer norm and fused projections that the rung asks for."""
    replaced = []
    if rung.plain_norm:
        replaced.append((layers, "layer_norm", plain_layer_norm))
    if rung.fused:
        replaced.append((blocks, "Attention", FusedAttention))
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def plain_layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """`layers.layer_norm` with the gradient that jax finds."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, -1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32 - mean), -1, keepdims=True) + eps)
    return ((x32 - mean) * inverse * scale + bias).astype(x.dtype)


class FusedAttention(blocks.Attention):
    """`Attention` whose queries, keys and values are one product, split afterwards; its parameters are the same."""

    def setup(self) -> None:
        c = self.config
        shape, axes = (c.hidden_size, c.num_heads, c.head_size), ("embed", "heads", "head_dim")
        self.query, self.key, self.value = (
            layers.Einsum("BTD,DNH->BTNH", shape, axes, c.weight_init()) for _ in range(3)
        )
        shape, axes = (c.num_heads, c.head_size, c.hidden_size), ("heads", "head_dim", "embed")
        self.output = layers.Einsum("BTNH,NHD->BTD", shape, axes, c.weight_init(residual=True))

    def __call__(self, x_BTD: Hidden, mask: Any, cache: None = None, slot: None = None) -> tuple[Hidden, None]:
        parts = (self.query, self.key, self.value)
        if self.is_initializing():
            q_BTNH, k_BTNH, v_BTNH = (part(x_BTD) for part in parts)
        else:
            kernel, bias = (
                jnp.concatenate([part.variables["params"][name] for part in parts], -2).astype(x_BTD.dtype)
                for name in ("kernel", "bias")
            )
            all_BTMH = jax.lax.dot_general(x_BTD, kernel, (((2,), (0,)), ((), ()))) + bias
            q_BTNH, k_BTNH, v_BTNH = jnp.split(all_BTMH, 3, axis=2)
        o_BTNH = blocks.dot_product_attention(q_BTNH, k_BTNH, v_BTNH, mask, choice=self.choice)
        return self.output(o_BTNH), cache
