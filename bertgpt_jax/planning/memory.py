"""Bytes that a step needs on one device, from sizes alone; held against XLA's own count in `tests/planning`.

Parameters, moments and the batch are exact. What the compiler needs beside them is a model with a few factors, fitted
to compiled programs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.parallel.mesh import AXES
from bertgpt_jax.parallel.sharding import flatten
from bertgpt_jax.planning.work import Shards, Work, pipeline_parts
from bertgpt_jax.shapes import PyTree

LANES = 128
"""Elements of a TPU's vector register along an array's last dimension."""
LOGIT_BYTES = 6.5
"""Bytes a logit: it and its gradient in bf16, and what is left of its exponential in fp32."""
LAYER_COPIES = 2.0
"""Values and gradients of a layer's arrays."""
SCORE_BYTES = 8.0
"""Bytes a score of attention without a fused kernel: it and its gradient in fp32."""
REPLICA_COPIES = 1.2
"""Copies of the gradients that replicas need to sum theirs, beside what adding up microbatches takes; this and the next
from BERT-large and GPT-2 medium with one row a chip on v4:2x2x1, where little else is in memory."""
UPDATE_COPIES = 2.2
"""Copies of the gradients while replicas sum them and update, with nothing left of the backward pass."""
TABLE_BYTES = 10.0
"""Bytes an entry of the token table whose gradient is summed over microbatches: in bf16, and twice in fp32."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        params, optimizer, batch: what the step is given.
        gradients: in fp32, twice where they are summed over microbatches, and more where replicas then sum theirs.
        activations: what the backward pass finds of the forward pass.
        working: the largest of what exists for a moment: a layer's arrays and gathered weights, or the head's logits.
        update: after the backward pass, where replicas sum gradients.
    """

    params: int
    optimizer: int
    batch: int
    gradients: int
    activations: int
    working: int
    update: int = 0

    @property
    def temporaries(self) -> int:
        """Beside what the step is given, at its worst moment."""
        return max(self.gradients + self.activations + self.working, self.update)

    @property
    def total(self) -> int:
        """All of it."""
        return self.params + self.optimizer + self.batch + self.temporaries


def held_bytes(tree: PyTree, sizes: Mapping[str, int]) -> int:
    """Bytes that one device holds of a tree whose leaves carry shardings, on a mesh of other sizes than theirs.

    Raises:
        ConfigError: a dimension that its axes do not divide.
    """
    total = 0
    for name, leaf in flatten(tree).items():
        shape = list(leaf.shape)
        for i, axes in enumerate(leaf.sharding.spec):
            parts = math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
            if shape[i] % parts:
                raise ConfigError(
                    f"{name}: size {shape[i]} of dimension {i} is not divisible by mesh {axes} = {parts}; use a mesh "
                    f"that divides it, or size {-(-shape[i] // parts) * parts}"
                )
            shape[i] //= parts
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def given_bytes(shards: Shards, state: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[int, int, int]:
    """Bytes on one device of (parameters, optimizer's state, batch).

    Args:
        state: abstract training state whose leaves carry shardings; of a mesh of any size.
        batch: abstract batch, name to array.

    Raises:
        ConfigError: a dimension that the mesh does not divide.
    """
    sizes = dict(zip(AXES, shards, strict=True))
    rows = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(dict(batch))) // shards.batch
    return held_bytes(state["params"], sizes), held_bytes(state["optimizer"], sizes), rows


def memory(work: Work, shards: Shards, given: tuple[int, int, int]) -> Memory:
    """What a step needs, `given` what it is given (`given_bytes`)."""
    summing, several = shards.data > 1, work.microbatches > 1
    copies = 1.0 if not several else 2.0 + REPLICA_COPIES * summing
    update = int(UPDATE_COPIES * given[0]) if summing else 0
    return Memory(*given, int(copies * given[0]), saved_bytes(work, shards), working_bytes(work, shards), update)


def positions(work: Work, shards: Shards) -> float:
    """Input positions of one microbatch on one device."""
    return work.positions / (shards.rows * shards.context * work.microbatches)


def layer_saved_bytes(work: Work, shards: Shards) -> float:
    """Bytes a position that a layer leaves for its backward pass."""
    d, w = work.width, work.width_bytes
    heads = work.heads * work.head_size / shards.tensor
    inner = work.feed_forward / shards.tensor
    if work.recomputes:
        return 0.0 if work.remat == "offload" else d * w
    if work.remat == "dots":
        # products of heads lie with the head's width along the vector lanes, of which narrow heads leave some empty
        lanes = -(-work.head_size // LANES) * LANES / work.head_size
        return (2 * d + 3 * heads * lanes + (work.matrices - 1) * inner) * w
    scores = 0.0 if work.fused_attention else (4 + 2 * w) * work.length * work.heads / shards.tensor
    activated = 1 if work.remat == "gelu" else 2
    return (4 * d + 5 * heads + activated * (work.matrices - 1) * inner) * w + scores


def saved_bytes(work: Work, shards: Shards) -> int:
    """Bytes that all layers of a device leave for the backward pass."""
    parts = max(pipeline_parts(work, shards), 1)
    turns = (parts + shards.pipe - 1) / parts  # stages compute before and after they have rows of their own
    return int(positions(work, shards) * work.layers / shards.pipe * turns * layer_saved_bytes(work, shards))


def working_bytes(work: Work, shards: Shards) -> int:
    """Bytes at the worst moment of the backward pass: in the head, or in a layer with its gathered weights."""
    n = positions(work, shards)
    scored = n * work.scored * ((work.head_chunk or work.length) / work.length if work.scored == 1 else 1.0)
    head = scored * work.vocabulary / shards.tensor * LOGIT_BYTES / 2 * work.width_bytes
    inner = (3 * work.feed_forward + 6 * work.heads * work.head_size) / shards.tensor
    scores = 0.0 if work.fused_attention else SCORE_BYTES * work.length * work.heads / shards.tensor
    layer = n * (LAYER_COPIES * (6 * work.width + inner) * work.width_bytes + scores)
    layer += work.layer_weights / shards.tensor * work.width_bytes
    table = work.vocabulary * work.width / shards.tensor * TABLE_BYTES if work.microbatches > 1 else 0.0
    return int(max(head, layer) + table)
