"""What examples of a data set are like: padding, masks, random next sentences, efficiency of packing."""

from __future__ import annotations

from typing import Any

import numpy as np

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.pair_counts import count_pairs
from bertgpt_jax.batches.pairs import SentencePairs

_WINDOWS = 64
"""Windows (of about 1,024 documents) whose pairs of one sentence are counted, at most."""


def example_statistics(dataset: Dataset, rows: int) -> dict[str, Any]:
    """Statistics of the first training rows. Shares are of 1; what the kind of example does not have is left out.

    Args:
        rows: how many rows are built and counted, at most an epoch.

    Returns:
        `examples`, `sequence_length`, `rows_per_epoch`, `rows` counted; `padding_share` of all slots and
        `packing_efficiency` (its complement over the whole epoch); `masked_share` of real tokens with
        `masks`: the shares of them that the model sees as mask, random or kept; `random_next_share` of pairs, and
        `one_sentence_share`: those of one sentence, which nothing follows, so that B is random whatever the draw (for
        sentence order only `swapped_share`); `segments_per_row`.
    """
    rows = min(rows, dataset.rows_per_epoch(0))
    step, sums = max(1, (1 << 18) // dataset.sequence_length), dict.fromkeys(_COUNTS, 0)
    for first in range(0, rows, step):
        batch = dataset.at(np.arange(first, min(first + step, rows)))
        for name, value in _count(batch, dataset.corpus.special.mask).items():
            sums[name] += value
    found: dict[str, Any] = {
        "examples": dataset.examples.kind,
        "sequence_length": dataset.sequence_length,
        "rows_per_epoch": dataset.rows_per_epoch(0),
        "rows": rows,
        "padding_share": 1 - sums["real"] / (rows * dataset.sequence_length),
        "packing_efficiency": dataset.packing_efficiency(0),
    }
    if dataset.masking is not None:
        predicted = max(sums["predicted"], 1)
        found["masked_share"] = sums["predicted"] / max(sums["real"], 1)
        found["masks"] = {kind: sums[kind] / predicted for kind in ("mask", "random", "kept")}
    if sums["pairs"] and isinstance(dataset.examples, SentencePairs):
        found |= _pair_shares(dataset, sums["labels"] / sums["pairs"])
    if sums["segments"]:
        found["segments_per_row"] = sums["segments"] / rows
    return found


_COUNTS = ("real", "predicted", "mask", "random", "kept", "pairs", "labels", "segments")


def _pair_shares(dataset: Dataset, labelled: float) -> dict[str, float]:
    """What the label 1 means, with its share of the pairs, and why it is more than was drawn."""
    if dataset.examples.task == "sentence_order":
        return {"swapped_share": labelled}
    length, seed = dataset.sequence_length, dataset.seed
    counts = count_pairs(dataset.corpus, dataset.examples, dataset.split, length, seed, windows=_WINDOWS)
    return {"random_next_share": labelled, "one_sentence_share": counts.alone / counts.pairs}


def _count(batch: dict[str, np.ndarray], mask: int | None) -> dict[str, int]:
    """The counts of some rows. A row of a causal model without segments is as full as its targets."""
    counts = dict.fromkeys(_COUNTS, 0)
    real = batch["segments"] > 0 if "segments" in batch else batch["weights"] > 0
    counts["real"] = int(real.sum())
    if "mask_weights" in batch:
        row, slot = np.nonzero(batch["mask_weights"])
        seen = batch["tokens"][row, batch["mask_positions"][row, slot]]
        kept = seen == batch["mask_labels"][row, slot]
        counts |= {"predicted": len(seen), "mask": int((seen == mask).sum()), "kept": int(kept.sum())}
        counts["random"] = len(seen) - counts["mask"] - counts["kept"]
    if "next_labels" in batch:
        counts["pairs"] = int(batch["next_weights"].sum())
        counts["labels"] = int((batch["next_labels"] * batch["next_weights"]).sum())
    if "segments" in batch:
        counts["segments"] = int(batch["segments"].max(1).sum())
    return counts
