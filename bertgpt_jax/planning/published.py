"""Published training runs on TPUs, which the time model is fitted to and held against."""

from __future__ import annotations

import dataclasses
import functools

from bertgpt_jax.planning.chips import CHIPS, GIB, Chip
from bertgpt_jax.planning.places import Place, parse
from bertgpt_jax.planning.roofline import step_time
from bertgpt_jax.planning.work import Shards, Work

MAXTEXT = "AI-Hypercomputer/maxtext MaxText/configs/{}, README.md beside it"
LEVANTER = "stanford-crfm/levanter docs/Levanter-1.0-Release.md; rows a core assumed"


@dataclasses.dataclass(frozen=True)
class PublishedRun:
    """A run whose speed is known.

    Attributes:
        mfu: published, with attention counted in full.
        fitted: whether the efficiencies were chosen looking at it.
    """

    name: str
    place: Place
    shards: Shards
    work: Work
    mfu: float
    source: str
    fitted: bool = True

    @property
    def parameters(self) -> float:
        """Of matrices and the tied table."""
        return self.work.layers * self.work.layer_weights + self.work.vocabulary * self.work.width

    def predicted(self) -> float:
        """MFU as the model has it, counted as the published one is."""
        w = self.work
        a_token = 6 * self.parameters + 12 * w.layers * w.length * w.heads * w.head_size
        seconds = step_time(w, self.shards, self.place, self.parameters).total
        return a_token * w.positions / seconds / (self.place.chips * self.place.chip.flops)

    def error(self) -> float:
        """Predicted MFU over the published one, less 1."""
        return self.predicted() / self.mfu - 1


def _v3_core() -> Chip:
    """Half a v3: its two cores are devices of their own, each with half the memory."""
    source = "cloud.google.com/tpu/docs/v3; links: Jouppi et al. 2021 (Ten Lessons), table 1"
    return Chip("v3", 61.5e12, 16 * GIB, 16 * GIB, 450e9, 41e9, 2, 16, 1, 8, 3e9, source)


def _maxtext(layers: int, width: int, heads: int, feed_forward: int, rows: int, **rest) -> Work:
    sizes = dict(layers=layers, width=width, heads=heads, feed_forward=feed_forward, rows=rows)
    return Work(**{"head_size": 128, "vocabulary": 32_000, "length": 2048, "matrices": 3, **sizes, **rest})


def _levanter(layers: int, width: int, heads: int, rows: int) -> Work:
    return Work(
        layers, width, heads, width // heads, 4 * width, 50_304, rows, 1024, remat="full", fused_attention=False
    )


@functools.cache
def runs() -> tuple[PublishedRun, ...]:
    """All of them; MaxText's sizes follow from `global_parameter_scale` (pyconfig.py)."""
    full, v3 = {"remat": "full"}, Place(_v3_core(), (16, 16))
    of_32b = dict(layers=32, width=8192, heads=64, feed_forward=28_672)
    return (
        PublishedRun("MaxText 32B", parse("v5p-128"), Shards(1, 16, 1, 1, 4),
                     _maxtext(**of_32b, rows=7 * 64, remat="dots"), 0.715, MAXTEXT.format("v5p/32b.sh")),
        PublishedRun("MaxText 64B", parse("v5p-128"), Shards(1, 16, 1, 1, 4),
                     _maxtext(64, 8192, 64, 28_672, 3 * 64, remat="dots"), 0.703, MAXTEXT.format("v5p/64b.sh"),
                     fitted=False),
        PublishedRun("MaxText 16B", parse("v5e:16x16"), Shards(1, 256, 1, 1, 1),
                     _maxtext(32, 4096, 64, 28_672, 6 * 256, **full), 0.611, MAXTEXT.format("v5e/16b.sh")),
        PublishedRun("MaxText 32B", parse("v5e:16x16"), Shards(1, 256, 1, 1, 1),
                     _maxtext(**of_32b, rows=4 * 256, **full), 0.669, MAXTEXT.format("v5e/32b.sh")),
        PublishedRun("MaxText 22B", parse("v4-128"), Shards(1, 64, 1, 1, 1),
                     _maxtext(48, 6144, 24, 24_576, 13 * 64, head_size=256, matrices=2, fused_attention=False,
                              length=1024, **full), 0.567, MAXTEXT.format("v4/22b.sh; reference attention assumed")),
        PublishedRun("Levanter GPT-2 345M", v3, Shards(1, 256, 1, 1, 1), _levanter(24, 1024, 16, 1024), 0.351,
                     LEVANTER),
        PublishedRun("Levanter GPT-2 750M", v3, Shards(1, 256, 1, 1, 1), _levanter(36, 1280, 20, 1024), 0.389,
                     LEVANTER),
        PublishedRun("Levanter GPT-2 1.4B", v3, Shards(1, 256, 1, 1, 1), _levanter(48, 1536, 24, 1024), 0.417,
                     LEVANTER),
    )  # fmt: skip


@functools.cache
def calibration_error() -> float:
    """The largest error of all runs, as a fraction."""
    return max(abs(run.error()) for run in runs())


def known_chips() -> tuple[str, ...]:
    """Chips for which there is a published run; predictions for others are extrapolated."""
    return tuple(name for name in CHIPS if any(run.place.chip.name == name for run in runs()))
