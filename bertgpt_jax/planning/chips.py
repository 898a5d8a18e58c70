"""Published figures of accelerators, from which step times are predicted."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
        name: as in `v5p:8x8x16`.
        flops: peak bf16 products and sums a second, dense.
        hbm_bytes: memory of a chip.
        usable_bytes: of it, what XLA lets a program have.
        hbm_bandwidth: bytes a second.
        link_bandwidth: bytes a second that one link carries one way; of GPUs, all of a chip's links together.
        torus: dimensions of the torus; 0 where a switch joins all chips of a host.
        ring: a side is closed to a ring if this divides it; 0: never.
        cores: by which a cloud name counts a chip: `v5p-512` is 256 chips.
        chips_per_host: of slices of several hosts.
        dcn_bandwidth: bytes a second and chip to other slices or hosts.
        source: of these figures.
    """

    name: str
    flops: float
    hbm_bytes: int
    usable_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    torus: int
    ring: int
    cores: int
    chips_per_host: int
    dcn_bandwidth: float
    source: str

    @property
    def platform(self) -> str:
        """cpu, gpu or tpu."""
        return "tpu" if self.name.startswith("v") else "cpu" if self.name == "cpu" else "gpu"


_TPU = "cloud.google.com/tpu/docs/{}; links and network: jax-ml.github.io/scaling-book/tpus; usable: libtpu's own limit"

# fmt: off
CHIPS = {chip.name: chip for chip in (
    Chip("v4", 275e12, 32 * GIB, int(30.75 * GIB), 1200e9, 45e9, 3, 4, 2, 4, 6.25e9, _TPU.format("v4")),
    Chip("v5e", 197e12, 16 * GIB, int(15.75 * GIB), 819e9, 50e9, 2, 16, 1, 4, 3.125e9, _TPU.format("v5e")),
    Chip("v5p", 459e12, 96 * GIB, int(95.74 * GIB), 2765e9, 100e9, 3, 4, 2, 4, 6.25e9, _TPU.format("v5p")),
    Chip("v6e", 918e12, 32 * GIB, int(31.25 * GIB), 1638e9, 100e9, 2, 16, 1, 4, 12.5e9, _TPU.format("v6e")),
    Chip("a100", 312e12, 80 * GIB, 79 * GIB, 2039e9, 300e9, 0, 0, 1, 8, 25e9,
         "nvidia.com/a100 (80 GB SXM); 8 x 200 Gbit/s a host"),
    Chip("h100", 989e12, 80 * GIB, 79 * GIB, 3350e9, 450e9, 0, 0, 1, 8, 50e9,
         "nvidia.com/h100 (SXM); 8 x 400 Gbit/s a host"),
    Chip("h200", 989e12, 141 * 10**9, 130 * GIB, 4800e9, 450e9, 0, 0, 1, 8, 50e9,
         "nvidia.com/h200 (SXM); 8 x 400 Gbit/s a host"),
    Chip("cpu", 100e9, 16 * GIB, 16 * GIB, 20e9, 10e9, 0, 0, 1, 8, 1e9,
         "made up: a program for CPU devices shows bytes and collectives, its time means nothing"),
)}
# fmt: on
"""Name -> chip."""
