"""Peak arithmetic of the accelerators we know, for the utilisation that the log prints."""

from __future__ import annotations

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
