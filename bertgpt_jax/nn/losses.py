"""Cross-entropy over a vocabulary, with a gradient that never builds an fp32 [tokens, vocabulary] buffer."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bertgpt_jax.shapes import Array


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def cross_entropy(
    logits: Array, labels: Array, z_loss: float = 0.0, label_smoothing: float = 0.0, words: int | None = None
) -> Array:
    """-log softmax(logits)[label], fp32 [...], for logits [..., V] of any float dtype and int labels [...].

    The label's logit is picked by comparison with an iota, not by a gather, whose gradient would scatter into an fp32
    copy of the logits. Saved for the gradient: the logits as they are and one fp32 log-sum-exp a row.

    Args:
        z_loss: coefficient of the added log(Z)^2 (Chowdhery et al. 2022, section 5).
        label_smoothing: share of the target spread evenly over the vocabulary (Szegedy et al. 2016, section 7).
        words: of the vocabulary, where V has more that can never win (`layers.hide_padding`).
    """
    return _forward(logits, labels, z_loss, label_smoothing, words)[0]


@jax.named_scope("cross_entropy")
def _forward(
    logits: Array, labels: Array, z_loss: float, label_smoothing: float, words: int | None
) -> tuple[Array, tuple]:
    high = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True)).astype(jnp.float32)
    total = jnp.sum(jnp.exp(logits.astype(jnp.float32) - high), -1)
    log_normalizer = jnp.log(total) + high[..., 0]
    picked = jnp.sum(jnp.where(_is_label(logits, labels), logits, 0).astype(jnp.float32), -1)
    if label_smoothing:
        mean = jnp.mean(logits[..., :words].astype(jnp.float32), -1)
        picked = (1 - label_smoothing) * picked + label_smoothing * mean
    loss = log_normalizer - picked
    if z_loss:
        loss = loss + z_loss * log_normalizer**2
    return loss, (logits, labels, log_normalizer)


@jax.named_scope("cross_entropy")
def _backward(
    z_loss: float, label_smoothing: float, words: int | None, saved: tuple, dloss: Array
) -> tuple[Array, np.ndarray]:
    logits, labels, log_normalizer = saved
    probability = jnp.exp(logits.astype(jnp.float32) - log_normalizer[..., None])
    if z_loss:
        probability = probability * (1 + 2 * z_loss * log_normalizer)[..., None]
    target = _is_label(logits, labels)
    if label_smoothing:
        words = words or logits.shape[-1]
        real = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) < words
        target = (1 - label_smoothing) * target + label_smoothing / words * real
    dlogits = (probability - target) * dloss[..., None]
    return dlogits.astype(logits.dtype), np.zeros(labels.shape, jax.dtypes.float0)


def _is_label(logits: Array, labels: Array) -> Array:
    return jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]


cross_entropy.defvjp(_forward, _backward)
