"""What accelerators can do: their peak arithmetic, for the utilisation that the log prints, and 8-bit products."""

from __future__ import annotations

import functools
import logging
from typing import Any

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn.blocks import ComputeConfig

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bf16 FLOP/s of one device by the start of its `device_kind` (vendors' data sheets: cloud.google.com/tpu/docs,
nvidia.com data centre pages; SXM parts)."""


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device kind; None where no peak is published (CPUs), and so no utilisation is claimed."""
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


FP8_CAPABILITY = (8, 9)
"""CUDA compute capability from which cuBLASLt multiplies 8-bit floats (cuBLAS manual, cublasLtMatmul; L4, H100)."""

FP8_PARAMETERS = 10**9
"""Below so many, rounding costs more than 8-bit products save (nanochat dev/LOG: faster at d26, slower at d12)."""

log = logging.getLogger(__name__)


def check_fp8(compute: ComputeConfig, device: Any) -> None:
    """ConfigError where 8-bit products are wanted that a device has none of, or XLA would not call, nor emulate.

    Args:
        compute: its platform known.
        device: one of those that compute; of another platform than `compute`'s it only stands for one.
    """
    lacks = _fp8_obstacle(compute.compiled_for(), device)
    if lacks and compute.matmul == "fp8" and not compute.emulate:
        raise ConfigError(
            f"execution.compute.matmul = 'fp8' on {device.device_kind}: {lacks}; use same, "
            "or set execution.compute.emulate=true to see what it gives, slowly"
        )


def warn_fp8(compute: ComputeConfig, parameters: int) -> None:
    """Says once that a model is small for the 8-bit products that it is computed with."""
    if compute.matmul == "fp8" and parameters < FP8_PARAMETERS:
        _warn_once(
            f"execution.compute.matmul = 'fp8' with {parameters:,} parameters: below {FP8_PARAMETERS:,} it is usually "
            "slower than bfloat16 (matmul=same)"
        )


def _fp8_obstacle(platform: str, device: Any) -> str:
    """Why a program for a platform cannot multiply 8-bit floats on a device; empty if it can."""
    needed = "it needs an NVIDIA GPU of compute capability {}.{} or later".format(*FP8_CAPABILITY)
    if platform != "gpu":
        return f"{needed}, not a {platform.upper()}"
    if device.platform not in ("gpu", "cuda", "rocm"):
        return ""
    capability = str(getattr(device, "compute_capability", "unknown"))
    major, _, minor = capability.partition(".")
    able = major.isdigit() and minor.isdigit() and (int(major), int(minor)) >= FP8_CAPABILITY
    return "" if able else f"{needed}, and this one's is {capability}"


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
