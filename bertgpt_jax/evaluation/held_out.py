"""Held-out loss, perplexity, bits per byte and accuracies, over frozen examples."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping

import jax
import numpy as np

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.objectives.base import Objective
from bertgpt_jax.shapes import Params

EvalStep = Callable[[Params, dict[str, jax.Array]], tuple[dict, dict, dict]]
"""(params, placed batch) -> (part sums, metric sums, part weights); `training.step.eval_step`, jitted."""


def evaluate(
    step: EvalStep,
    params: Params,
    batches: int,
    batch: Callable[[int], dict[str, jax.Array]],
    objective: Objective,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Metrics over batches 0..batches-1, added up in double precision; each row counts once, padding rows not at all.

    Args:
        should_stop: polled between batches; when it turns true the result is None.

    Returns:
        `loss` (the total of the coefficients' parts), `<part>_loss` where there are several, the objective's metrics.
    """
    sums: Mapping[str, float] = defaultdict(float)
    metrics: Mapping[str, float] = defaultdict(float)
    weights: Mapping[str, float] = defaultdict(float)
    for i in range(batches):
        if should_stop():
            return None
        for total, part in zip((sums, metrics, weights), jax.device_get(step(params, batch(i))), strict=True):
            for name, value in part.items():
                total[name] += float(value)
    mean = {name: sums[name] / max(weights[name], 1.0) for name in sums}
    result = {"loss": sum(c * mean[name] for name, c in objective.coefficients().items())}
    if len(mean) > 1:
        result |= {f"{name}_loss": value for name, value in mean.items()}
    parts = objective.metric_parts()
    return result | {name: value / max(weights[parts[name]], 1.0) for name, value in metrics.items()}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, data: Dataset) -> float:
    """A causal model's loss (nats a token) as bits per UTF-8 byte of the split's text.

    Every token of the split counts at the mean loss, end-of-document tokens included, so tokenizers compare fairly.
    """
    corpus = data.corpus
    tokens = sum(stop - start for _, start, stop in corpus.split_tokens(data.split))
    return loss * tokens / (math.log(2) * max(corpus.split_bytes(data.split), 1))


def unigram_masked_loss(train: Dataset, held_out: Dataset, sample_tokens: int = 50_000_000) -> float:
    """Mean negative log-probability of the frozen masked targets under the train split's unigram distribution.

    What a model that ignores the context can reach: the line a masked-LM loss must be far below. Counts are of train
    tokens (at most `sample_tokens`), with one added to every id.
    """
    corpus = train.corpus
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
