"""The chunked head equals the plain one: loss, count of right ones, and all gradients, on one device and on meshes."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn.linear_cross_entropy import linear_cross_entropy

B, T, D, V = 4, 12, 8, 20


def _operands(dtype: jnp.dtype = jnp.float32) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((B, T, D)), dtype)
    table = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(V), jnp.float32)
    labels = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.uniform(0, 2, (B, T)) * rng.integers(0, 2, (B, T)), jnp.float32)
    return x, table, bias, labels, weights


def _plain(x, table, bias, labels, weights, z_loss=0.0, label_smoothing=0.0):
    logits = (jnp.einsum("BTD,VD->BTV", x, table.astype(x.dtype)) + bias.astype(x.dtype)).astype(jnp.float32)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, V), label_smoothing)
    log_z = jax.nn.logsumexp(logits, -1)
    loss = optax.softmax_cross_entropy(logits, targets) + z_loss * log_z**2
    right = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0] >= logits.max(-1)
    return jnp.sum(loss * weights), jnp.sum(right * weights)


def _both(function, x, table, bias, labels, weights, **settings):
    def scaled(x, table, bias):
        loss, right = function(x, table, bias, labels, weights, **settings)
        return 3.0 * loss, right

    (loss, right), gradients = jax.value_and_grad(scaled, argnums=(0, 1, 2), has_aux=True)(x, table, bias)
    return loss, right, *gradients


@pytest.mark.parametrize("chunk", [1, 4, 12])
@pytest.mark.parametrize("extra", [{}, {"z_loss": 1e-2}, {"label_smoothing": 0.1}])
def test_equals_the_plain_head(chunk: int, extra: dict[str, float]) -> None:
    operands = _operands()
    got, want = _both(linear_cross_entropy, *operands, chunk=chunk, **extra), _both(_plain, *operands, **extra)
    for ours, reference in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=2e-5)
    without = linear_cross_entropy(*operands, chunk=chunk, **extra)  # no gradient asked for
    np.testing.assert_allclose(without.loss * 3, want[0], rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 1), (2, 2), (1, 4)])
def test_on_a_mesh(shape: tuple[int, int]) -> None:
    operands = _operands()
    want = _both(_plain, *operands, label_smoothing=0.1, z_loss=1e-3)
    mesh = jax.make_mesh(
        shape, ("rows", "words"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules((("rows", "rows"), ("act_vocab", "words"))):
        run = jax.jit(lambda *a: _both(linear_cross_entropy, *a, chunk=4, label_smoothing=0.1, z_loss=1e-3))
        got = run(*operands)
        text = run.lower(*operands).compile().as_text()
    for ours, reference in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=2e-5)
    if shape == (4, 1):
        bodies = re.findall(r"body=%?([\w.-]+)", text)
        blocks = {block.split()[0].lstrip("%"): block for block in text.split("\n\n") if block.split()}
        assert bodies and "all-reduce" in text
        assert not any("all-reduce" in blocks[body] for body in bodies), "rows are summed once, after the loop"


def test_bfloat16_keeps_sums_in_fp32_and_no_full_logits() -> None:
    x, *rest = _operands(jnp.bfloat16)
    got, want = _both(linear_cross_entropy, x, *rest, chunk=4), _both(_plain, x, *rest)
    assert got[0].dtype == jnp.float32 and got[2].dtype == jnp.bfloat16 and got[3].dtype == jnp.float32
    np.testing.assert_allclose(got[0], want[0], rtol=2e-2)
    compiled = jax.jit(lambda *a: _both(linear_cross_entropy, *a, chunk=4)).lower(x, *rest).compile()
    assert f"[{B},{T},{V}]" not in compiled.as_text()


@pytest.mark.parametrize("chunk", [0, 5, 24])
def test_a_chunk_that_does_not_divide(chunk: int) -> None:
    rule = "does not divide the 12 scored positions of a row; use one of 1, 2, 3, 4, 6, 12$"
    with pytest.raises(ConfigError, match=f"execution.compute.head_chunk = {chunk} {rule}"):
        linear_cross_entropy(*_operands(), chunk=chunk)


def test_a_vocabulary_that_the_mesh_does_not_divide() -> None:
    mesh = jax.make_mesh((8,), ("words",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", None), ("act_vocab", "words"))):
        with pytest.raises(ConfigError, match="vocabulary of 20 rows is not divisible by mesh"):
            linear_cross_entropy(*_operands(), chunk=4)
