"""What an objective is: named loss parts, each a sum with a weight, so that microbatches and hosts add up exactly."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from pydantic import Field

from bertgpt_jax.config import ADDED, Config
from bertgpt_jax.nn.linear_cross_entropy import linear_cross_entropy
from bertgpt_jax.nn.losses import cross_entropy
from bertgpt_jax.shapes import Array, Params

Batch = dict[str, Array]
"""Arrays of one batch by name; see the objective for which."""


CACHED_LOGITS = 10 << 20
"""Bytes of logits that a CPU's last cache keeps between the product that makes them and the uses of them. The head of
benchmark `cpu_gpt` (2,048 tokens, 8,192 words; L3 of 32 MiB) with its gradients takes 0.6 of the time that it takes in
one piece; from 2 to 16 MiB it makes little difference."""


class Sums(NamedTuple):
    """Result of a loss on some rows.

    Attributes:
        parts: part name -> sum over the rows of its weighted losses, fp32 [].
        metrics: metric name -> sum over the rows; `Objective.metric_parts` says which part's weight divides it.
        carry: recurrent state for the next batch, `()` when unused.
    """

    parts: dict[str, Array]
    metrics: dict[str, Array]
    carry: Any = ()


class VocabularyLoss(Config):
    """Settings of a cross-entropy over the vocabulary."""

    z_loss: Annotated[float, ADDED] = Field(
        default=0.0, ge=0, description="coefficient of the squared log-normaliser (PaLM: 1e-4)"
    )
    label_smoothing: Annotated[float, ADDED] = Field(
        default=0.0, ge=0, lt=1, description="share of the target spread over the vocabulary"
    )

    def vocabulary_sums(self, model: Any, params: Params, x: Array, labels: Array, weights: Array) -> tuple:
        """(summed cross-entropy, number predicted right) of hidden states [B, P, D], both weighted by `weights` [B, P].

        Where `execution.compute.head_chunk` asks for it, and on one CPU, the logits exist in chunks only.
        """
        words = model.config.vocab_size
        settings = {"z_loss": self.z_loss, "label_smoothing": self.label_smoothing, "words": words}
        table, bias = model.head_weights(params)
        chunk = model.compute.head_chunk or chunk_in_cache(model.compute.compiled_for(), x.shape, table.shape[0])
        if chunk is not None:
            return linear_cross_entropy(x, table, bias, labels, weights, chunk=chunk, **settings)
        logits = model.apply({"params": params}, x, method="logits")
        loss = jnp.sum(cross_entropy(logits, labels, *settings.values()) * weights)
        return loss, jnp.sum(is_best(logits, labels) * weights)


def chunk_in_cache(platform: str, x_shape: tuple[int, ...], words: int) -> int | None:
    """Positions, a divisor of all, whose fp32 logits are about `CACHED_LOGITS`; None where there is no need to cut.

    Never fewer tokens than half the width: adding up the table's gradients would cost more than is gained. Only for one
    CPU: on accelerators speed is traded for memory there, which is for their users to say.
    """
    mesh, (rows, positions, width), each = jax.sharding.get_abstract_mesh(), x_shape, 4 * x_shape[0] * words
    if platform != "cpu" or not (mesh.empty or mesh.size == 1) or positions * each <= CACHED_LOGITS:
        return None
    divisors = [n for n in range(1, positions + 1) if positions % n == 0]
    least = next((n for n in divisors if 2 * n * rows >= width), positions)
    return max(n for n in divisors if n * each <= CACHED_LOGITS or n == least)


class Objective(Protocol):
    """Device half of an objective; the config classes of `objectives/` implement it."""

    def coefficients(self) -> dict[str, float]:
        """Part name -> its coefficient in the total loss."""

    def metric_parts(self) -> dict[str, str]:
        """Metric name -> the part whose weight divides its sum."""

    def weights(self, batch: Batch) -> dict[str, Array]:
        """Part name -> total weight of `batch`, known before any microbatch is differentiated."""

    def abstract_batch(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch, for compiling before there is one."""

    def scored_share(self, sequence_length: int) -> float:
        """Share of positions that reach the vocabulary head."""

    def model_inputs(self, batch: Batch) -> tuple:
        """Positional arguments of the model's `__call__` for a batch."""

    def loss(self, model: Any, params: Params, batch: Batch, carry: Any, key: Array | None) -> Sums:
        """Sums over the rows of `batch`; dropout is on when `key` is given."""


def total_loss(objective: Objective, sums: dict[str, Array], weights: dict[str, Array]) -> Array:
    """sum over parts of coefficient x sum / weight; a part of weight 0 contributes 0."""
    total = jnp.zeros((), jnp.float32)
    for name, coefficient in objective.coefficients().items():
        weight = weights[name]
        total += coefficient * sums[name] / jnp.where(weight > 0, weight, 1.0)
    return total


def rngs(key: Array | None) -> dict[str, Array]:
    """The dropout stream of `Module.apply`, empty for evaluation."""
    return {} if key is None else {"dropout": key}


def is_best(logits: Array, labels: Array) -> Array:
    """fp32 [...]: 1 where the label's logit is the largest (ties count).

    A comparison with the maximum that the cross-entropy needs anyway; an argmax costs another pass over the logits.
    """
    label_logit = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], logits, 0), -1)
    return (label_logit >= jnp.max(logits, -1)).astype(jnp.float32)
