"""GPUs that are not here, to compile for: XLA takes a description in place of the chip (openxla/xla issue 25919)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.planning.places import Place

_CHIPS = {
    "a100": dict(shared=166_912, cores=108, fpus=64, l2=41_943_040, clock=1.41, major=8, name="NVIDIA A100-SXM4-80GB"),
    "h100": dict(shared=232_448, cores=132, fpus=128, l2=52_428_800, clock=1.98, major=9, name="NVIDIA H100 80GB HBM3"),
    "h200": dict(shared=232_448, cores=132, fpus=128, l2=62_914_560, clock=1.98, major=9, name="NVIDIA H200"),
}
"""Bytes of shared memory a block, multiprocessors, fp32 units of each, bytes of L2, GHz, compute capability
(CUDA C programming guide, table of compute capabilities; data sheets)."""

_CUDNN = (9, 28)
"""Version of cuDNN that is compiled for."""


def description(place: Place) -> str:
    """The protocol-buffer text that XLA compiles from (`GpuTargetConfigProto`)."""
    chip, facts = place.chip, _CHIPS[place.chip.name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {facts["shared"] + 1024}
  shared_memory_per_block_optin: {facts["shared"]}
  core_count: {facts["cores"]} fpus_per_core: {facts["fpus"]} clock_rate_ghz: {facts["clock"]}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.hbm_bandwidth)} l2_cache_size: {facts["l2"]} device_memory_size: {chip.hbm_bytes}
  cuda_compute_capability {{ major: {facts["major"]} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{facts["name"]}"
"""


def devices(place: Place) -> list[Any]:
    """Devices of a place; programs compile for them, nothing runs on them.

    Raises:
        ConfigError: this jax cannot compile for GPUs that are not here.
    """
    from jax.experimental import topologies

    shape = f"1x{place.hosts}x{place.chips // place.hosts}"
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=description(place), topology=shape)
    except Exception as error:  # the plugin raises whatever its C++ does
        text = " ".join(str(error).split())[:200]
        raise ConfigError(f"topology '{place.name}': the CUDA plugin cannot describe it ({text})") from None
    return list(found.devices)


@contextlib.contextmanager
def stand_in(place: Place) -> Iterator[None]:
    """While it lasts, jax traces cuDNN attention as if a GPU of the place were here.

    It asks the GPU that runs for its compute capability, by private functions, and without one would trace no packed
    rows. For programs that are compiled and not run.

    Raises:
        ConfigError: this jax asks by other functions.
    """
    from jax._src.cudnn import fused_attention_stablehlo as private

    def number(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("."))

    here = (_CHIPS[place.chip.name]["major"], 0)
    answers = {
        "check_cudnn_version": lambda: 10_000 * _CUDNN[0] + 100 * _CUDNN[1],
        "check_compute_capability": lambda least: here >= number(least),
        "is_cuda_compute_capability_equal": lambda asked: here == number(asked),
    }
    if missing := [name for name in answers if not hasattr(private, name)]:
        raise ConfigError(f"topology '{place.name}': this jax has no {missing[0]} to answer in place of a GPU")
    with contextlib.ExitStack() as restored:
        for name, answer in answers.items():
            restored.callback(setattr, private, name, getattr(private, name))
            setattr(private, name, answer)
        yield
