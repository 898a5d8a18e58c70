"""Predicted step time: matrix products, memory, links and data-centre network, from sizes and published chip figures.

Products and memory passes follow one another, so their times add; collectives run beside them as far as the compiler
can hide them. The efficiencies below are fitted to published runs (`published.py`); their error is the prediction's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from bertgpt_jax.parallel.mesh import AXES
from bertgpt_jax.planning.links import axis_bandwidth, over_network
from bertgpt_jax.planning.places import Place
from bertgpt_jax.planning.work import Shards, Work, pipeline_parts

MATMUL = 0.93
"""Share of the peak that large matrix products reach, their sides padded to the matrix unit."""
ATTENTION = 0.45
"""The same of fused attention, whose softmax runs on the vector unit."""
HBM = 0.80
"""Share of the memory's bandwidth that elementwise passes reach."""
LINKS = 0.80
"""Share of a link's bandwidth that collectives reach."""
HIDDEN = 0.85
"""Share of computation beside which gathers and reductions of weights can run."""
EXPOSED = 0.5
"""Share of the tensor axis's collectives that nothing hides: what follows needs their result."""
PASSES = 12.0
"""Reads and writes of [positions, width] arrays by norms, residuals and reshapes of a layer's forward pass."""
SCORE_BYTES = 10.0
"""Bytes moved a score (query x key x head) by a forward pass of attention without a fused kernel."""
OPTIMIZER_BYTES = 32.0
"""Bytes moved a parameter by an update: it, two moments and the gradient in fp32, read and written."""


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and what they are spent on.

    Attributes:
        matmul, hbm: of computation, one after the other.
        ici, dcn: that collectives take by themselves, hidden or not, over the links of a slice (of GPUs, of a host) and
            over the network.
        bubble: of waiting for the pipeline's other stages.
        total: predicted.
        by_axis: seconds of collectives by mesh axis.
    """

    matmul: float
    hbm: float
    ici: float
    dcn: float
    bubble: float
    total: float
    by_axis: Mapping[str, float]

    @property
    def binding(self) -> str:
        """The term that a faster step would have to shorten: of `ici` and `dcn`, what computation cannot hide."""
        open_links = max(self.total - self.matmul - self.hbm - self.bubble, 0.0)
        network = "dcn" if self.dcn > self.ici else "ici"
        terms = {"matmul": self.matmul, "hbm": self.hbm, network: open_links, "pipeline bubble": self.bubble}
        return max(terms, key=lambda name: terms[name])


def step_time(
    work: Work, shards: Shards, place: Place, parameters: float, sent: Mapping[str, float] | None = None
) -> StepTime:
    """Predicts a step.

    Args:
        parameters: of the whole model.
        sent: mesh axis to bytes that a device sends along it in a step (read from a compiled program, then with what
            crosses between slices as `dcn`); by default the analytic `sent_bytes`.
    """
    chip = place.chip
    sent = sent_bytes(work, shards, parameters) if sent is None else sent
    matmul = matmul_seconds(work, shards, place)
    hbm = hbm_bytes(work, shards, parameters) / (chip.hbm_bandwidth * HBM)
    bubble = (shards.pipe - 1) / max(pipeline_parts(work, shards) * work.pipeline_repeats, 1) * (matmul + hbm)
    bandwidth = axis_bandwidth(place, shards, work.dcn_fsdp)
    by_axis = {axis: sent.get(axis, 0.0) / (bandwidth[axis] * LINKS) for axis in AXES}
    dcn = sent.get("dcn", 0.0) / (chip.dcn_bandwidth * LINKS)
    for axis, size, spans in zip(AXES, shards, (place.slices // work.dcn_fsdp, work.dcn_fsdp), strict=False):
        if spans > 1 and "dcn" not in sent:  # all chips of a slice share what goes to the others
            dcn += sent.get(axis, 0.0) * (spans - 1) / (size - 1) / (chip.dcn_bandwidth * LINKS)
    far = over_network(place, shards, work.dcn_fsdp)
    dcn += sum(by_axis[axis] for axis in far)
    ici = sum(seconds for axis, seconds in by_axis.items() if axis not in far)
    waiting = by_axis[AXES[-1]]
    beside = ici + dcn - waiting
    total = matmul + hbm + bubble + EXPOSED * waiting + max(0.0, beside - HIDDEN * (matmul + hbm))
    return StepTime(matmul, hbm, ici, dcn, bubble, total, by_axis)


def matmul_seconds(work: Work, shards: Shards, place: Place) -> float:
    """Seconds of all matrix products of a step on one device, attention among them."""
    chip, positions = place.chip, work.positions / (shards.rows * shards.context)
    unit = 256 if chip.name == "v6e" else 128
    split_heads = work.heads * work.head_size / shards.tensor
    forward = 2.0 * (
        4 * _padded(work.width, unit) * _padded(split_heads, unit)
        + work.matrices * _padded(work.width, unit) * _padded(work.feed_forward / shards.tensor, unit)
    )
    stack = forward * (4 if work.recomputes else 3) * work.layers / shards.pipe
    head = 6.0 * _padded(work.width, unit) * _padded(work.vocabulary / shards.tensor, unit) * work.scored
    products = positions * (stack + head) / (chip.flops * MATMUL)

    keys = work.length * (0.5 if work.causal and work.fused_attention else 1.0)
    each = 2.0 * keys * split_heads * work.layers / shards.pipe
    again = 2 if work.remat in ("full", "offload", "dots") else 0
    if work.fused_attention:
        wasted = _padded(work.head_size, 128) / work.head_size
        return products + positions * each * (7 + again) * wasted / (chip.flops * ATTENTION)
    return products + positions * each * (6 + again) / (chip.flops * MATMUL)


def hbm_bytes(work: Work, shards: Shards, parameters: float) -> float:
    """Bytes that elementwise passes, the head and the optimizer move through a device's memory in a step."""
    positions = work.positions / (shards.rows * shards.context)
    passes = 4 if work.recomputes else 3.5 if work.remat == "dots" else 3
    element = work.width_bytes
    layer = PASSES * work.width + (6 * work.heads * work.head_size + 4 * work.feed_forward) / shards.tensor
    moved = layer * element * passes
    if not work.fused_attention:
        moved += SCORE_BYTES * work.length * work.heads / shards.tensor * passes
    head = 6 * element * work.vocabulary / shards.tensor * work.scored
    held = parameters / (shards.fsdp * shards.tensor * shards.pipe)
    gathered = parameters / (shards.tensor * shards.pipe) * element * 6 * work.microbatches
    accumulated = 12 * held * work.microbatches if work.microbatches > 1 else 0
    return positions * (moved * work.layers / shards.pipe + head) + held * OPTIMIZER_BYTES + gathered + accumulated


def sent_bytes(work: Work, shards: Shards, parameters: float) -> dict[str, float]:
    """Bytes that a device sends along each mesh axis in a step."""
    element, parts = work.width_bytes, work.microbatches
    stack = work.layers * work.layer_weights / (shards.tensor * shards.pipe)
    tables = max(parameters - work.layers * work.layer_weights, 0) / shards.tensor
    positions = work.positions / (shards.rows * shards.context)
    hidden = positions * work.width * element
    # gathered for the forward and once for the backward pass, recomputed or not; gradients reduced
    weights = element * 3 * stack + element * 4 * tables
    held = parameters / (shards.fsdp * shards.tensor * shards.pipe)
    layers = work.layers / shards.pipe
    passes = 5 if work.recomputes else 4  # the last sum of a layer is not computed again
    return dict(
        zip(
            AXES,
            (
                2 * 4 * held * _others(shards.data),  # gradients, once a step and in fp32
                weights * parts * _others(shards.fsdp),
                2 * hidden * work.pipeline_repeats if shards.pipe > 1 else 0.0,
                3 * 2 * hidden * work.heads * work.head_size / work.width / shards.tensor * layers
                * (shards.context - 1),
                2 * passes * hidden * layers * _others(shards.tensor),
            ),
            strict=True,
        )
    )  # fmt: skip


def _others(size: int) -> float:
    """Share of an array that is not a device's own."""
    return (size - 1) / size


def _padded(size: float, unit: int) -> float:
    """`size` rounded up to the matrix unit."""
    return math.ceil(size / unit) * unit
