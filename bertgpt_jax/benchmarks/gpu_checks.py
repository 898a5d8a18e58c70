"""Benchmark `gpu_checks`: whether this device's kernels compute what plain operations do, forward and gradients.

Attention by each path that the device has, products of 8-bit operands, the vocabulary head in chunks: each is held
against fp32 arithmetic on the same bf16 numbers, and may be off by a few times what plain bf16 operations are off.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from bertgpt_jax.benchmarks.gpu_sides import short
from bertgpt_jax.benchmarks.harness import Result, Row
from bertgpt_jax.config import Config
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn import fp8
from bertgpt_jax.nn.attention import Path, PathChoice, dot_product_attention
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.linear_cross_entropy import linear_cross_entropy
from bertgpt_jax.nn.losses import cross_entropy
from bertgpt_jax.nn.masks import AttentionMask, causal_mask, segment_mask
from bertgpt_jax.shapes import Array
from bertgpt_jax.training.hardware import check_fp8

TIMES = 4.0
"""How many times the error of plain bf16 operations a kernel's may be."""
LEAST = 2.0**-6
"""An error that is always allowed: two roundings of bf16."""
WORST = 1e9
"""What stands in the record for an error that is no number."""


class Settings(Config):
    """Settings of the benchmark."""

    rows: int = Field(default=4, ge=4)
    length: int = Field(default=512, ge=32)
    heads: int = Field(default=4, ge=1)
    widths: tuple[int, ...] = Field(default=(64, 128), description="of heads")
    hidden: int = Field(default=768, ge=16, multiple_of=16)
    vocabulary: int = Field(default=8192, ge=128)
    emulate: bool = Field(default=False, description="check splash too where there is no TPU, emulated and slow")


class Outputs(NamedTuple):
    """One computation done three ways; each is a list of arrays, the result and its gradients.

    Attributes:
        names: of the arrays.
        found: by what is checked.
        exact: in fp32.
        plain: by plain operations in bf16; what they are off is what may be expected.
    """

    names: tuple[str, ...]
    found: Sequence[Any]
    exact: Sequence[Any]
    plain: Sequence[Any]


class LeftOut(Exception):
    """Why a check cannot be made here."""


Check = Callable[[], Outputs]


def run(settings: Settings) -> Result:
    """Makes all checks; what fails is written down, and the rest goes on."""
    rows, facts, failures = [], {}, []
    for name, check in checks(settings):
        begun = time.perf_counter()
        found = facts[name] = judged(check)
        worst = max((e["largest"] / e["allowed"] for e in found.get("errors", {}).values()), default=None)
        if worst is not None:
            rows.append(
                Row(f"{name}: largest error over what is allowed", min(worst, WORST), "x", most=1.0, detail=True)
            )
        if found["status"] == "failed":
            failures.append(f"{name}: {found['why']}")
        why = f" ({found['why']})" if found.get("why") else ""
        print(f"  {name}: {found['status']}{why} ({time.perf_counter() - begun:.0f} s)", flush=True)
    states = [found["status"] for found in facts.values()]
    rows.insert(0, Row(f"checks that failed, of {len(states) - states.count('left out')}", len(failures), "", most=0))
    return Result(tuple(rows), {}, facts=facts, failures=tuple(failures))


def checks(settings: Settings) -> Iterator[tuple[str, Check]]:
    """Name and check, all that there are; those that cannot be made here raise `LeftOut`."""
    platform = jax.default_backend()
    paths: list[Path] = ["cudnn"]
    paths += ["splash"] * (platform == "tpu" or settings.emulate)
    paths += ["tokamax"] * (importlib.util.find_spec("tokamax") is not None)
    for path, width, what in itertools.product(paths, settings.widths, masks(settings)):
        name = f"attention by {path}, heads of {width}, {what}"
        yield name, functools.partial(attention, settings, path, width, what)
    yield "products of 8-bit operands", functools.partial(eight_bits, settings)
    yield "vocabulary head in chunks", functools.partial(chunked_head, settings)


# ---------------------------------------------------------------- judging


def judged(check: Check) -> dict[str, Any]:
    """`status`: passed, failed or left out, `why`, and the `errors` of each array: `largest`, `plain`, `allowed`."""
    try:
        outputs = check()
        errors = {
            name: errors_of(found, exact, plain) for name, found, exact, plain in zip(*map(_host, outputs), strict=True)
        }
    except LeftOut as reason:
        return {"status": "left out", "why": str(reason)}
    except Exception as error:  # noqa: BLE001 (a kernel that does not compile or run: the other checks go on)
        return {"status": "failed", "why": short(error)}
    wrong = [
        f"{name} is off by {e['largest']:.2g}, over {e['allowed']:.2g}"
        for name, e in errors.items()
        if not e["largest"] <= e["allowed"]
    ]
    if wrong:
        return {"status": "failed", "why": ", ".join(wrong), "errors": errors}
    return {"status": "passed", "errors": errors}


def _host(values: Sequence[Any]) -> list[Any]:
    return [value if isinstance(value, str) else np.asarray(value).astype(np.float64) for value in values]


def errors_of(found: np.ndarray, exact: np.ndarray, plain: np.ndarray) -> dict[str, float]:
    """The largest error of a vector (the last dimension) over its length, of both, and what is allowed.

    A vector is taken to be at least as long as vectors are on average: fused kernels subtract what they have rounded,
    so that a gradient which should vanish is as far off as others are.
    """
    lengths = np.linalg.norm(np.atleast_1d(exact), axis=-1)
    lengths = np.maximum(lengths, np.sqrt(np.mean(lengths**2)) + 1e-30)
    largest, expected = (
        float(np.max(np.linalg.norm(np.atleast_1d(x - exact), axis=-1) / lengths)) for x in (found, plain)
    )
    finite = bool(np.isfinite(found).all())
    return {
        "largest": min(largest, WORST) if finite else WORST,
        "plain": expected,
        "allowed": max(TIMES * expected, LEAST),
    }


# ---------------------------------------------------------------- attention


def masks(settings: Settings) -> dict[str, AttentionMask]:
    """What every path is asked to compute; in the last row no token is real."""
    rows, length = settings.rows, settings.length
    starts = np.arange(rows)[:, None]
    real = np.linspace(length, 0, rows).astype(np.int32)[:, None]
    place = np.arange(length)[None]
    whole = np.where(place < real, 1, 0).astype(np.int32)
    # 1 to 3 segments of uneven length, then padding; the first row has no padding
    packed = np.where(place < real, 1 + (place > length // 8 + starts) + (place > length // 3 + starts), 0)
    packed = jnp.asarray(packed, jnp.int32)
    return {
        "causal": causal_mask(),
        "padded rows": segment_mask(jnp.asarray(whole), packed=False),
        "causal window": AttentionMask(causal=True, window=length // 4),
        "packed rows": segment_mask(packed, max_segments=3),
        "packed rows, causal": causal_mask(packed, max_segments=3),
        "queries without a key": AttentionMask(q_segments_BT=packed, kv_segments_BS=jnp.where(packed == 2, 9, packed)),
    }


def attention(settings: Settings, path: Path, width: int, what: str) -> Outputs:
    """The path's, the reference's in fp32 and in bf16; where rows are padded, of the tokens that are real.

    The references are computed by the CPU, which needs no time to find out how.
    """
    mask = masks(settings)[what]
    choice = PathChoice(path, jax.default_backend(), emulate=settings.emulate)
    shape = (settings.rows, settings.length, settings.heads, width)
    rng = np.random.default_rng(0)
    half = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(4)]
    real_BT11 = jnp.ones((1, 1, 1, 1))
    if mask.lengths_B is not None:  # what padding attends to is nobody's business, and differs
        real_BT11 = (mask.q_segments_BT > 0)[:, :, None, None].astype(jnp.float32)

    def all_of(attend: Callable, q: Array, k: Array, v: Array, g: Array) -> list[Array]:
        out, pull = jax.vjp(attend, q, k, v)
        real = real_BT11.astype(out.dtype)
        return [out * real, *pull(g.astype(out.dtype) * real)]

    def by(choice: PathChoice, inputs: list[Array]) -> list[Array]:
        attend = functools.partial(dot_product_attention, mask=mask, choice=choice)
        return jax.jit(functools.partial(all_of, attend))(*inputs)

    def by_cpu(inputs: list[Array]) -> list[Array]:
        return by(PathChoice("reference", "cpu"), jax.device_put(inputs, the_cpu()))

    try:
        jax.eval_shape(functools.partial(by, choice), half)
    except ConfigError as error:
        raise LeftOut(str(error)) from None
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    return Outputs(names, by(choice, half), by_cpu([x.astype(jnp.float32) for x in half]), by_cpu(half))


def the_cpu() -> jax.Device:
    """The CPU, beside whatever else there is."""
    return jax.local_devices(backend="cpu")[0]


# ---------------------------------------------------------------- products and the head


def eight_bits(settings: Settings) -> Outputs:
    """`fp8.dot_general` as the device computes it, and as the CPU does, which multiplies the same numbers in fp32."""
    device = jax.devices()[0]
    try:
        check_fp8(ComputeConfig(dtype="bfloat16", matmul="fp8", platform=jax.default_backend()), device)
    except ConfigError as error:
        raise LeftOut(str(error)) from None
    found = products(settings, device, jnp.bfloat16)
    cpu = the_cpu()
    names = ("product", "gradient of x", "gradient of the kernel")
    return Outputs(names, found, products(settings, cpu, jnp.float32), products(settings, cpu, jnp.bfloat16))


def products(settings: Settings, device: Any, dtype: Any) -> list[Array]:
    """A product of 8-bit operands and its gradients on a device, from the same bf16 numbers whatever the dtype."""
    rng, width = np.random.default_rng(0), settings.hidden
    shapes = (
        (settings.rows * settings.length, width),
        (width, 4 * width),
        (settings.rows * settings.length, 4 * width),
    )
    x, kernel, dy = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16).astype(dtype) for shape in shapes)

    def all_of(x: Array, kernel: Array, dy: Array) -> list[Array]:
        y, pull = jax.vjp(lambda x, kernel: fp8.dot_general(x, kernel, ((1,), (0,))), x, kernel)
        return [y, *pull(dy)]

    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        return jax.jit(all_of)(*jax.device_put((x, kernel, dy), device))


def chunked_head(settings: Settings) -> Outputs:
    """The loss of the head in four chunks, that of the whole logits in fp32, and the same in bf16."""
    rows, length, width, words = settings.rows, settings.length, settings.hidden, settings.vocabulary
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, length, width)), jnp.bfloat16)
    table = jnp.asarray(0.02 * rng.standard_normal((words, width)), jnp.bfloat16).astype(jnp.float32)
    labels = jnp.asarray(rng.integers(0, words, (rows, length)), jnp.int32)
    weights = jnp.asarray(rng.random((rows, length)) < 0.8, jnp.float32).at[-1].set(0)

    def chunked(x: Array, table: Array) -> Array:
        return linear_cross_entropy(x, table, None, labels, weights, chunk=length // 4).loss

    def whole(x: Array, table: Array) -> Array:
        return jnp.sum(weights * cross_entropy(x @ table.T.astype(x.dtype), labels))

    def all_of(loss: Callable, x: Array) -> list[Array]:
        value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, table)
        return [value, *gradients]

    with jax.default_matmul_precision("highest"):
        exact = all_of(whole, x.astype(jnp.float32))
    names = ("loss", "gradient of x", "gradient of the table")
    return Outputs(names, all_of(chunked, x), exact, all_of(whole, x))
