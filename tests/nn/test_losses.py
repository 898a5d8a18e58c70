"""Cross-entropy against optax and float64, and what its gradient keeps in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bertgpt_jax.nn.losses import cross_entropy

ROWS, VOCABULARY = 12, 37


def inputs(scale: float = 3.0):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 4, VOCABULARY)) * scale
    return logits, rng.integers(0, VOCABULARY, (3, 4)), rng.random((3, 4))


def exact(logits, labels, weights):
    """Losses and gradient of their weighted sum in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    hot = np.eye(logits.shape[-1])[labels]
    return -(log_p * hot).sum(-1), (np.exp(log_p) - hot) * np.asarray(weights, np.float64)[..., None]


def value_and_grad(function, logits, labels, weights):
    grads, losses = jax.grad(lambda x: (lambda y: (jnp.sum(y * weights), y))(function(x, labels)), has_aux=True)(logits)
    return losses, grads


@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_float32_equals_float64_and_optax(scale: float) -> None:
    logits, labels, weights = inputs(scale)
    logits, weights = jnp.asarray(logits, jnp.float32), jnp.asarray(weights, jnp.float32)
    losses, grads = value_and_grad(cross_entropy, logits, labels, weights)
    assert losses.dtype == grads.dtype == jnp.float32 and losses.shape == labels.shape
    for other in (
        exact(logits, labels, weights),
        value_and_grad(optax.softmax_cross_entropy_with_integer_labels, logits, labels, weights),
    ):
        np.testing.assert_allclose(losses, other[0], rtol=2e-6, atol=1e-6 * scale)
        np.testing.assert_allclose(grads, other[1], rtol=2e-5 if scale < 10 else 2e-4, atol=1e-7)


def test_bfloat16_logits_give_float32_losses_and_bfloat16_gradients() -> None:
    logits, labels, weights = inputs()
    logits, weights = jnp.asarray(logits, jnp.bfloat16), jnp.asarray(weights, jnp.float32)
    losses, grads = value_and_grad(cross_entropy, logits, labels, weights)
    assert (losses.dtype, grads.dtype) == (jnp.float32, jnp.bfloat16)
    truth = exact(logits, labels, weights)
    np.testing.assert_allclose(losses, truth[0], rtol=2e-6, atol=2e-6)  # the sum itself is in fp32
    np.testing.assert_allclose(grads.astype(jnp.float32), truth[1], rtol=2**-8, atol=1e-9)  # rounded once
    wide = value_and_grad(
        lambda x, y: optax.softmax_cross_entropy_with_integer_labels(x.astype(jnp.float32), y), logits, labels, weights
    )
    np.testing.assert_allclose(losses, wide[0], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(grads.astype(jnp.float32), wide[1].astype(jnp.float32), rtol=2**-7, atol=1e-6)


def test_gradient_sums_to_zero_over_the_vocabulary() -> None:
    logits, labels, weights = inputs()
    _, grads = value_and_grad(
        cross_entropy, jnp.asarray(logits, jnp.float32), labels, jnp.asarray(weights, jnp.float32)
    )
    np.testing.assert_allclose(jnp.sum(grads, -1), 0, atol=1e-6)


def test_forbidden_tokens_of_minus_infinity() -> None:
    logits, labels, _ = inputs()
    labels[:] = 5
    logits[..., 20:] = -np.inf
    losses, grads = value_and_grad(cross_entropy, jnp.asarray(logits, jnp.float32), labels, 1.0)
    short = value_and_grad(cross_entropy, jnp.asarray(logits[..., :20], jnp.float32), labels, 1.0)
    np.testing.assert_allclose(losses, short[0], rtol=1e-6)
    np.testing.assert_allclose(grads[..., :20], short[1], rtol=1e-6)
    assert not np.any(grads[..., 20:])


def _wide_residuals(function, logits, labels) -> list:
    _, pull = jax.vjp(lambda x: function(x, labels), logits)
    return [leaf for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float32 and leaf.size >= logits.size]


def test_no_float32_copy_of_bfloat16_logits_is_saved() -> None:
    logits, labels, _ = inputs()
    logits = jnp.asarray(logits, jnp.bfloat16)
    assert _wide_residuals(cross_entropy, logits, labels) == []
    wide = _wide_residuals(
        lambda x, y: optax.softmax_cross_entropy_with_integer_labels(x.astype(jnp.float32), y), logits, labels
    )
    assert wide, "the check itself must see what optax keeps"


def test_what_is_saved_is_the_logits_and_a_number_a_row() -> None:
    logits, labels, _ = inputs()
    _, pull = jax.vjp(lambda x: cross_entropy(x, labels), jnp.asarray(logits, jnp.bfloat16))
    saved = [leaf for leaf in jax.tree.leaves(pull) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert sorted((leaf.shape, str(leaf.dtype)) for leaf in saved) == [
        ((3, 4), "float32"),
        ((3, 4, VOCABULARY), "bfloat16"),
    ]
