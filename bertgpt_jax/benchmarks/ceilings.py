"""Benchmark `ceilings`: what the devices do at best: matrix products, copies, and sums over all of them.

What a training step can reach is a share of these, not of what data sheets say.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pydantic import Field

from bertgpt_jax.benchmarks.harness import Result, Row, Side, compare
from bertgpt_jax.config import Config
from bertgpt_jax.shapes import Array
from bertgpt_jax.training.hardware import peak_flops

SEEN = {"gemm": (769e12, 798e12), "copy": 4.3e12}
"""One H200 as PyTorch saw it: 8192^3 in bf16 on random data, FLOP/s; a device-to-device copy, bytes/s read and
written."""


class Settings(Config):
    """Settings of the benchmark."""

    size: int = Field(default=8192, ge=8, description="of square bf16 matrices")
    chain: int = Field(default=8, ge=1, description="products of a timed call, each of the one before")
    copy_mib: int = Field(default=4096, ge=1, description="bytes that are copied, in MiB")
    reduce_mib: int = Field(default=512, ge=1, description="of each device, summed over all of them")
    rounds: int = Field(default=20, ge=1)
    warmup: int = Field(default=3, ge=0)


def run(settings: Settings) -> Result:
    """Measures the first device, and all together where there are several."""
    device, rows, found = jax.devices()[0], [], {}
    measures = [gemm, copy] + [all_reduce] * (len(jax.devices()) > 1)
    for measure in measures:
        name, unit, work, side = measure(settings)
        found[side.name] = compare([side], settings.rounds, settings.warmup)
        rows.append(Row(name, work / found[side.name]["seconds"][side.name]["median"], unit))
    facts: dict[str, Any] = {"device": device.device_kind, "seen_on_one_h200_by_pytorch": SEEN}
    peak = peak_flops(device.device_kind)
    if peak is not None:
        rows.append(Row("of the data sheet's dense bf16 peak", 100e12 * rows[0].value / peak, "%"))
    return Result(tuple(rows), found, facts=facts)


Measure = tuple[str, str, float, Side]
"""What a reader sees, its unit, the work of a step in that unit's terms, and what does it."""


def gemm(settings: Settings) -> Measure:
    """bf16 products of random matrices (zeros run faster), each scaled so that the next is as large."""
    n = settings.size
    keys = jax.random.split(jax.random.key(0))
    x, w = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in keys)
    w = w * jnp.asarray(n**-0.5, jnp.bfloat16)

    @jax.jit
    def products(x: Array, w: Array) -> Array:
        for _ in range(settings.chain):
            x = x @ w
        return x

    side = Side("gemm", lambda: (x, w), lambda operands: products(*operands).block_until_ready())
    return f"bf16 product, {n} x {n} x {n}", "TFLOP/s", 2.0 * n**3 * settings.chain / 1e12, side


def copy(settings: Settings) -> Measure:
    """A copy within the device's memory: bytes read and bytes written."""
    size = settings.copy_mib << 20
    x = jnp.arange(size // 4, dtype=jnp.uint32)
    copied = jax.jit(jnp.copy)
    side = Side("copy", lambda: x, lambda x: copied(x).block_until_ready())
    return f"copy of {settings.copy_mib} MiB, read and written", "GB/s", 2.0 * size / 1e9, side


def all_reduce(settings: Settings) -> Measure:
    """A sum over all devices; the bandwidth is that of a ring's links, 2 (n - 1) / n of the bytes each."""
    devices = jax.devices()
    count, size = len(devices), settings.reduce_mib << 20
    mesh, by_device = Mesh(np.array(devices), ("devices",)), PartitionSpec("devices")
    make = jax.jit(lambda: jnp.ones((count, size // 4), jnp.float32), out_shardings=NamedSharding(mesh, by_device))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=by_device, out_specs=PartitionSpec())
    def total(x: Array) -> Array:
        return jax.lax.psum(x, "devices")

    side = Side("all_reduce", make, lambda x: total(x).block_until_ready())
    work = 2.0 * (count - 1) / count * size / 1e9
    return f"all-reduce of {settings.reduce_mib} MiB over {count} devices, a link", "GB/s", work, side
