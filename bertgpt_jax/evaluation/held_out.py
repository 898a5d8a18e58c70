"""Held-out loss, perplexity, bits per byte and accuracies, over frozen examples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.objectives.base import Objective
from bertgpt_jax.shapes import Params

EvalStep = Callable[[Params, dict[str, jax.Array]], tuple[dict, dict, dict]]
"""(params, placed batch) -> (part sums, metric sums, part weights); `training.step.eval_step`, jitted."""


@dataclasses.dataclass(frozen=True)
class Sums:
    """Part sums, metric sums and part weights of some rows; those of more rows are added with +."""

    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Sums) -> Sums:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Sums(*({k: a.get(k, 0.0) + b.get(k, 0.0) for k in a | b} for a, b in pairs))


def add_up(
    step: EvalStep,
    params: Params,
    batches: int,
    batch: Callable[[int], dict[str, jax.Array]],
    should_stop: Callable[[], bool] = lambda: False,
) -> Sums | None:
    """Sums over batches 0..batches-1, in double precision; each row counts once, padding rows not at all.

    Args:
        should_stop: polled between batches; when it turns true the result is None.
    """
    total = Sums()
    for i in range(batches):
        if should_stop():
            return None
        found = jax.device_get(step(params, batch(i)))
        total += Sums(*({name: float(value) for name, value in part.items()} for part in found))
    return total


def means(sums: Sums, objective: Objective) -> dict[str, float]:
    """`loss` (the total of the coefficients' parts), `<part>_loss` where there are several, the objective's metrics."""
    weights = sums.weights
    mean = {name: value / max(weights[name], 1.0) for name, value in sums.parts.items()}
    result = {"loss": sum(c * mean[name] for name, c in objective.coefficients().items())}
    if len(mean) > 1:
        result |= {f"{name}_loss": value for name, value in mean.items()}
    parts = objective.metric_parts()
    return result | {name: value / max(weights[parts[name]], 1.0) for name, value in sums.metrics.items()}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(losses: Iterable[tuple[float, Dataset]]) -> float:
    """A causal model's losses (nats a token) on one or several held-out splits as bits per UTF-8 byte of their text.

    Every token of a split counts at its mean loss, end-of-document tokens included, so tokenizers compare fairly.
    """
    nats = size = 0.0
    for loss, data in losses:
        nats += loss * sum(stop - start for _, start, stop in data.corpus.split_tokens(data.split))
        size += data.corpus.split_bytes(data.split)
    return nats / (math.log(2) * max(size, 1))


def unigram_masked_loss(held_out: Dataset, sample_tokens: int = 50_000_000) -> float:
    """Mean negative log-probability of the frozen masked targets under the corpus's unigram distribution.

    What a model that ignores the context can reach: the line a masked-LM loss must be far below. Counts are of train
    tokens (at most `sample_tokens`), with one added to every id.
    """
    corpus = held_out.corpus
    counts = np.ones(corpus.vocab_size, np.float64)
    left = sample_tokens
    for _, start, stop in corpus.split_tokens("train"):
        for first in range(start, min(stop, start + left), 1 << 20):
            length = min(1 << 20, stop - first)
            tokens = corpus.gather(np.array([first]), np.array([length]))
            counts += np.bincount(tokens, minlength=corpus.vocab_size)
            left -= length
    counts[corpus.special_mask()] = 1.0
    nll = -np.log(counts / counts.sum())
    total = weight = 0.0
    for i in range(held_out.eval_batches()):
        batch = held_out.eval_batch(i)
        total += float((nll[batch["mask_labels"]] * batch["mask_weights"]).sum())
        weight += float(batch["mask_weights"].sum())
    return total / weight
