"""Whether one segment of a batch reaches another: it is perturbed, and all others are compared bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bertgpt_jax.batches.examples import Examples
from bertgpt_jax.batches.packing import PackedDocuments, PackedPairs
from bertgpt_jax.batches.sentences import FullSentences
from bertgpt_jax.batches.streams import ContiguousStreams
from bertgpt_jax.batches.windows import FullDocuments, Windows
from bertgpt_jax.errors import DataError
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.nn.probe import added_to_embeddings
from bertgpt_jax.objectives.base import Objective, total_loss
from bertgpt_jax.shapes import Params

HostBatch = dict[str, np.ndarray]
Observe = Callable[[Params, HostBatch], tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]]
"""(params, batch) -> (final hidden states [B, T, D], loss sums by part, gradient [B, T, D] to the embeddings)."""

Segment = tuple[int, int]
"""(row, segment id): padding has id 0; where rows are not packed, a whole row is (row, 1)."""


@dataclasses.dataclass(frozen=True)
class Leak:
    """What the perturbation of a segment did to the others.

    Attributes:
        perturbed: the segment whose tokens were exchanged.
        outputs: segments whose hidden states changed.
        gradients: segments whose gradient (of their own losses, to their own embeddings) changed.
        losses: whether the summed losses of the others changed.
        reached: whether the gradient of the others' losses reaches the perturbed segment's embeddings.
    """

    perturbed: Segment
    outputs: tuple[Segment, ...]
    gradients: tuple[Segment, ...]
    losses: bool
    reached: bool

    def __bool__(self) -> bool:
        return bool(self.outputs or self.gradients or self.losses or self.reached)


def packed(examples: Examples) -> bool:
    """Whether a row holds several segments that must not see each other."""
    return isinstance(examples, PackedDocuments | PackedPairs)


def crosses_documents(examples: Examples) -> bool:
    """Whether the documents of a row see each other by design."""
    return isinstance(examples, Windows | ContiguousStreams | FullDocuments | FullSentences)


def segment_ids(batch: HostBatch, examples: Examples) -> np.ndarray:
    """int32[B, T]: the segment of each slot; all 1 where rows are not packed."""
    return batch["segments"] if packed(examples) else np.ones_like(batch["tokens"])


def observer(model: Any, objective: Objective) -> Observe:
    """The jitted observation of a model; dropout is off."""

    def observe(params: Params, batch: HostBatch) -> tuple:
        inputs = objective.model_inputs(batch)
        upto = next(i for i, x in enumerate(inputs) if isinstance(x, AttentionMask)) + 1
        hidden_BTD = model.apply({"params": params}, *inputs[:upto], method="encode")

        def total(delta_BTD: jax.Array) -> tuple:
            with added_to_embeddings(delta_BTD):
                parts = objective.loss(model, params, batch, (), None).parts
            return total_loss(objective, parts, objective.weights(batch)), parts

        (_, parts), gradient_BTD = jax.value_and_grad(total, has_aux=True)(jnp.zeros_like(hidden_BTD))
        return hidden_BTD, parts, gradient_BTD

    return jax.jit(observe)


def find_leaks(
    observe: Observe,
    params: Params,
    batch: HostBatch,
    examples: Examples,
    regular: np.ndarray,
    trials: int = 3,
    seed: int = 0,
) -> list[Leak]:
    """One result for each of up to `trials` segments that are perturbed, each by itself.

    Args:
        batch: rows with all weights; see `rows_to_check`.
        regular: bool[V], ids that may be exchanged: the special ones stay.

    Raises:
        DataError: the batch has fewer than two segments, or none with regular tokens.
    """
    ids, rng = segment_ids(batch, examples), np.random.default_rng(seed)
    present = [(r, int(s)) for r in range(len(ids)) for s in np.unique(ids[r]) if s]
    usable = [(r, s) for r, s in present if regular[batch["tokens"][r][ids[r] == s]].any()]
    if len(present) < 2 or not usable:
        raise DataError(
            f"a leak needs two segments with text; this batch of {len(ids)} rows has {len(present)} segments, "
            f"{len(usable)} with regular tokens: raise batch_size or sequence_length"
        )
    # those in the middle of full rows have neighbours on both sides
    usable.sort(key=lambda rs: (-ids[rs[0]].max(), abs(rs[1] - (ids[rs[0]].max() + 1) / 2)))
    return [_perturb(observe, params, batch, ids, chosen, regular, rng) for chosen in usable[:trials]]


def _perturb(
    observe: Observe,
    params: Params,
    batch: HostBatch,
    ids: np.ndarray,
    chosen: Segment,
    regular: np.ndarray,
    rng: np.random.Generator,
) -> Leak:
    inside = (ids == chosen[1]) & (np.arange(len(ids)) == chosen[0])[:, None]
    exchanged = inside & regular[batch["tokens"]]
    before = without_weight(batch, inside)
    after = before | {"tokens": before["tokens"].copy()}
    choices = np.flatnonzero(regular)
    places = np.searchsorted(choices, before["tokens"][exchanged])
    other = (places + rng.integers(1, max(len(choices), 2), exchanged.sum())) % len(choices)
    after["tokens"][exchanged] = choices[other]

    hidden, parts, gradient = (jax.device_get(x) for x in observe(params, before))
    hidden_after, parts_after, gradient_after = (jax.device_get(x) for x in observe(params, after))
    if not (hidden != hidden_after).any(-1)[inside].any():
        raise DataError(f"perturbing segment {chosen} changes nothing in its own outputs: nothing can be concluded")

    def segments(changed_BT: np.ndarray) -> tuple[Segment, ...]:
        rows, slots = np.nonzero(changed_BT & ~inside)
        return tuple(sorted({(int(r), int(ids[r, t])) for r, t in zip(rows, slots, strict=True)}))

    return Leak(
        chosen,
        outputs=segments((hidden != hidden_after).any(-1)),
        gradients=segments((gradient != gradient_after).any(-1)),
        losses=any((parts[name] != parts_after[name]).any() for name in parts),
        reached=bool((gradient[inside] != 0).any() or (gradient_after[inside] != 0).any()),
    )


def without_weight(batch: HostBatch, inside: np.ndarray) -> HostBatch:
    """A copy of the batch in which what is predicted at slots `inside` (bool[B, T]) weighs nothing."""
    places = {"weights": None, "mask_weights": "mask_positions", "next_weights": "cls_positions"}
    changed = {}
    for name, where in places.items():
        if name not in batch:
            continue
        if where in batch:
            here = np.take_along_axis(inside, batch[where].astype(np.int64), axis=1)
        else:
            here = inside[:, 0] if batch[name].ndim == 1 else inside
        changed[name] = np.where(here, 0, batch[name]).astype(batch[name].dtype)
    return batch | changed


def rows_to_check(batches: Callable[[int], HostBatch], examples: Examples, rows: int, search: int = 16) -> HostBatch:
    """The rows of the first batches that hold most segments.

    Raises:
        DataError: rows are packed, but none of the first `search` batches has two segments in a row.
    """
    for n in range(search if packed(examples) else 1):
        batch = batches(n)
        count = segment_ids(batch, examples).max(1)
        if count.max() > 1 or not packed(examples):
            chosen = np.argsort(-count, kind="stable")[:rows]
            return {name: array[chosen] for name, array in batch.items()}
    raise DataError(f"no row of the first {search} batches holds two segments; raise sequence_length")
