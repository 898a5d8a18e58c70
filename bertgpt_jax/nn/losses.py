"""Cross-entropy over a vocabulary, with a gradient that never builds an fp32 [tokens, vocabulary] buffer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bertgpt_jax.shapes import Array


@jax.custom_vjp
def cross_entropy(logits: Array, labels: Array) -> Array:
    """-log softmax(logits)[label], fp32 [...], for logits [..., V] of any float dtype and int labels [...].

    The label's logit is picked by comparison with an iota, not by a gather, whose gradient would scatter into an fp32
    copy of the logits. Saved for the gradient: the logits as they are and one fp32 log-sum-exp a row.
    """
    return _forward(logits, labels)[0]


def _forward(logits: Array, labels: Array) -> tuple[Array, tuple]:
    high = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True)).astype(jnp.float32)
    total = jnp.sum(jnp.exp(logits.astype(jnp.float32) - high), -1)
    log_normalizer = jnp.log(total) + high[..., 0]
    picked = jnp.sum(jnp.where(_is_label(logits, labels), logits, 0).astype(jnp.float32), -1)
    return log_normalizer - picked, (logits, labels, log_normalizer)


def _backward(saved: tuple, dloss: Array) -> tuple[Array, np.ndarray]:
    logits, labels, log_normalizer = saved
    probability = jnp.exp(logits.astype(jnp.float32) - log_normalizer[..., None])
    dlogits = (probability - _is_label(logits, labels)) * dloss[..., None]
    return dlogits.astype(logits.dtype), np.zeros(labels.shape, jax.dtypes.float0)


def _is_label(logits: Array, labels: Array) -> Array:
    return jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]


cross_entropy.defvjp(_forward, _backward)
