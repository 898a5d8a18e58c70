"""The real train step compiled for a place, in a process of its own: bytes, collectives, seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertgpt_jax.errors import ConfigError, UserError
from bertgpt_jax.planning.hlo import Collective, attention_kernels, collectives
from bertgpt_jax.planning.places import Place, parse
from bertgpt_jax.training.run_config import RunConfig

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of a step on one device.

    Attributes:
        trace_seconds, compile_seconds: what it took.
        arguments: bytes of state and batch.
        temporaries: bytes beside them, at the step's worst moment.
        outputs: bytes of results that do not reuse the arguments' memory.
        needed: bytes in all; where the compiler gave up for want of memory, what it says it needed.
        fits: whether it compiled and has room.
        collectives: of one step; empty if it did not compile.
        attention: fused attention kernels of one step, forward and backward.
        fp8: products of 8-bit operands that cuBLASLt computes; those in a loop's body count once.
    """

    trace_seconds: float
    compile_seconds: float
    arguments: int
    temporaries: int
    outputs: int
    needed: int
    fits: bool
    collectives: tuple[Collective, ...]
    attention: tuple[int, int]
    fp8: int

    def sent(self) -> dict[str, float]:
        """Bytes that a device sends along each mesh axis; those over several axes are shared out among them.

        What crosses between slices is under `dcn` instead.
        """
        total: dict[str, float] = {}
        for one in self.collectives:
            if one.network:
                total["dcn"] = total.get("dcn", 0.0) + one.sent
                continue
            for axis in one.axes:
                total[axis] = total.get(axis, 0.0) + one.sent / len(one.axes)
        return total


def compile_step(config: RunConfig, place: Place, stage: int = 0, timeout: float | None = None) -> Compiled:
    """Compiles a stage's step for a place, whatever this process runs on.

    Raises:
        ConfigError: what would stop the run; a compiler that is not installed.
        UserError: the compiler failed for another reason than memory, or took longer than `timeout` seconds.
    """
    check_compiler(place)
    job = {"config": config.model_dump(mode="json"), "place": place.name, "slices": place.slices, "stage": stage}
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        try:
            done = subprocess.run(
                [sys.executable, "-m", "bertgpt_jax.planning.child", str(out)],
                input=json.dumps(job),
                env=_environment(place),
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"compiling for {place.name} took longer than {timeout:.0f} s") from None
        if not out.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"compiling for {place.name} failed with exit code {done.returncode}: {last[:300]}")
        result = json.loads(out.read_text())
    if "refused" in result:
        raise ConfigError(result["refused"])
    parts = tuple(Collective(**{**one, "axes": tuple(one["axes"])}) for one in result.pop("collectives"))
    return Compiled(**result | {"attention": tuple(result["attention"])}, collectives=parts)


def check_compiler(place: Place) -> None:
    """ConfigError, with the command that installs it, where the compiler for a place is missing."""
    platform, name = place.chip.platform, place.name
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"compiling for {name} needs libtpu; run: pip install 'bertgpt_jax[libtpu]'")
    if platform == "gpu" and not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13, 14)):
        raise ConfigError(f"compiling for {name} needs the CUDA plugin; run: pip install 'bertgpt_jax[cuda]'")


def _environment(place: Place) -> dict[str, str]:
    """The child's environment: jax itself runs on the CPU, with as many devices as the place has if it is `cpu:N`."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags).strip()
    if place.chip.platform == "cpu":
        flags += f" --xla_force_host_platform_device_count={place.chips}"
    elif place.chip.platform == "gpu":  # without a GPU nothing can be timed (openxla/xla issue 41021)
        flags += " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false --xla_gpu_cublas_fallback=true"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}


def compile_here(job: Mapping[str, Any]) -> dict[str, Any]:
    """What the child does: traces, compiles and reads the program; JSON tree of `Compiled`, or {"refused": why}."""
    import jax

    from bertgpt_jax.config import build
    from bertgpt_jax.planning.gpu import stand_in
    from bertgpt_jax.training.ahead import lower_step

    place = parse(job["place"], job["slices"])
    begun = time.perf_counter()
    try:
        with stand_in(place) if place.chip.platform == "gpu" else contextlib.nullcontext():
            lowered = lower_step(build(RunConfig, job["config"], "config"), _devices(place), job["stage"])
    except ConfigError as error:
        return {"refused": str(error)}
    traced = time.perf_counter()
    result = {"trace_seconds": traced - begun, "arguments": 0, "temporaries": 0, "outputs": 0}
    result |= {"collectives": [], "attention": (0, 0), "fp8": 0}
    try:
        program = lowered.step.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        return {**result, "compile_seconds": time.perf_counter() - traced, "needed": needed, "fits": False}
    seconds, memory = time.perf_counter() - traced, program.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
    text = program.as_text()
    shape = lowered.program.mesh.shape
    found = collectives(text, shape, lowered.program.config.execution.mesh.across_slices(place.slices, dict(shape)))
    return result | {
        "compile_seconds": seconds,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": outputs,
        "needed": needed,
        "fits": needed <= place.chip.usable_bytes,
        "collectives": [dataclasses.asdict(one) for one in found],
        "attention": attention_kernels(text),
        "fp8": text.count('custom_call_target="__cublas$lt$matmul$f8"'),
    }


def needed_bytes(message: str) -> int | None:
    """Bytes that XLA says a program needs beside what there is; None if the message is about something else."""
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message:
        return None
    found = re.search(r"(?:Used|temporaries \(|requirement:?|allocate) ?([\d.]+)([KMGT])", message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def _devices(place: Place) -> list[Any]:
    import jax

    if place.chip.platform == "tpu":
        from bertgpt_jax.parallel import topology

        return list(topology.describe(place.name, place.slices))
    if place.chip.platform == "cpu":
        return jax.devices("cpu")[: place.chips]
    from bertgpt_jax.planning.gpu import devices

    return devices(place)
