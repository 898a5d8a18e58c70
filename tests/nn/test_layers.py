"""Layers: the norm with its own gradient, dropout, activations, the einsum and embedding modules."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.nn.layers import Einsum, Embedding, LayerNorm, RMSNorm, activation, dropout, layer_norm, rms_norm

EPS = 1e-5


def plain_layer_norm(x, scale, bias):
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), -1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + EPS) * scale + bias


def value_and_pulled(function, args, cotangent):
    y, pull = jax.vjp(function, *args)
    return (y, *pull(cotangent))


def norm_inputs(offset: float = 0.0, width: int = 24):
    rng = np.random.default_rng(0)
    x = offset + rng.standard_normal((3, 5, width))
    return (x, rng.standard_normal(width), rng.standard_normal(width)), rng.standard_normal((3, 5, width))


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_layer_norm_equals_autodiff_and_float64(offset: float) -> None:
    args, cotangent = norm_inputs(offset)
    with jax.enable_x64(True):
        exact = value_and_pulled(plain_layer_norm, args, cotangent)
        assert exact[0].dtype == jnp.float64
    args32, cotangent32 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (args, cotangent))
    ours = value_and_pulled(lambda *a: layer_norm(*a, EPS), args32, cotangent32)
    plain = value_and_pulled(plain_layer_norm, args32, cotangent32)
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert mine.dtype == jnp.float32 and mine.shape == truth.shape
        np.testing.assert_allclose(mine, truth, rtol=1e-5, atol=(2e-5 if offset else 3e-6) * np.abs(truth).max())
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=(2e-5 if offset else 3e-6) * np.abs(truth).max())


def test_layer_norm_of_bfloat16_computes_in_float32() -> None:
    (x, scale, bias), cotangent = norm_inputs(8.0)
    x, cotangent = (jnp.asarray(a, jnp.bfloat16) for a in (x, cotangent))
    scale, bias = (jnp.asarray(a, jnp.float32) for a in (scale, bias))
    y, dx, dscale, dbias = value_and_pulled(lambda *a: layer_norm(*a, EPS), (x, scale, bias), cotangent)
    assert (y.dtype, dx.dtype, dscale.dtype, dbias.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32)
    wide = [a.astype(jnp.float32) for a in (x, scale, bias, cotangent)]
    exact = value_and_pulled(plain_layer_norm, wide[:3], wide[3])
    for mine, truth in zip((y, dx), exact[:2], strict=True):  # one rounding to bf16 at the very end
        np.testing.assert_allclose(mine.astype(jnp.float32), truth, rtol=2**-7, atol=1e-4)
    np.testing.assert_allclose(dscale, exact[2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dbias, exact[3], rtol=1e-4, atol=1e-4)


def test_layer_norm_keeps_no_float32_copy_of_a_bfloat16_input() -> None:
    (x, scale, bias), _ = norm_inputs()
    x = jnp.asarray(x, jnp.bfloat16)

    def wide_residuals(function) -> int:
        _, pull = jax.vjp(function, x, jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32))
        return sum(leaf.dtype == jnp.float32 and leaf.shape == x.shape for leaf in jax.tree.leaves(pull))

    assert wide_residuals(lambda *a: layer_norm(*a, EPS)) == 0
    assert wide_residuals(lambda x, *a: plain_layer_norm(x.astype(jnp.float32), *a).astype(x.dtype)) > 0


def test_constant_row_gives_the_bias_and_finite_gradients() -> None:
    x, scale, bias = jnp.full((2, 8), 3.0), jnp.ones(8), jnp.arange(8.0)
    y, *grads = value_and_pulled(lambda *a: layer_norm(*a, 1e-12), (x, scale, bias), jnp.ones((2, 8)))
    np.testing.assert_allclose(y, np.broadcast_to(bias, (2, 8)), atol=1e-5)
    assert all(np.all(np.isfinite(g)) for g in grads)


def test_layer_norm_module_starts_as_the_plain_norm() -> None:
    x = jnp.asarray(norm_inputs()[0][0], jnp.float32)
    y, variables = LayerNorm(24, EPS).init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(np.mean(y, -1), 0, atol=1e-6)
    np.testing.assert_allclose(np.var(y, -1), 1, atol=1e-4)
    assert set(variables["params"]) == {"scale", "bias"}


def plain_rms_norm(x, scale):
    return x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPS) * scale


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_rms_norm_equals_autodiff_and_float64(offset: float) -> None:
    (x, scale, _), cotangent = norm_inputs(offset)
    with jax.enable_x64(True):
        exact = value_and_pulled(plain_rms_norm, (x, scale), cotangent)
        assert exact[0].dtype == jnp.float64
    x, scale, cotangent = (jnp.asarray(a, jnp.float32) for a in (x, scale, cotangent))
    ours = value_and_pulled(lambda *a: rms_norm(*a, EPS), (x, scale), cotangent)
    plain = value_and_pulled(plain_rms_norm, (x, scale), cotangent)
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert mine.dtype == jnp.float32 and mine.shape == truth.shape
        np.testing.assert_allclose(mine, truth, rtol=1e-5, atol=3e-6 * np.abs(truth).max())
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=3e-6 * np.abs(truth).max())


def test_rms_norm_of_bfloat16_computes_in_float32_and_keeps_one_number_a_row() -> None:
    (x, scale, _), cotangent = norm_inputs(8.0)
    x, cotangent, scale = (jnp.asarray(a, t) for a, t in ((x, "bfloat16"), (cotangent, "bfloat16"), (scale, "float32")))
    y, pull = jax.vjp(lambda *a: rms_norm(*a, EPS), x, scale)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float32 and leaf.ndim == x.ndim]
    assert [leaf.shape for leaf in kept] == [(*x.shape[:-1], 1)]
    dx, dscale = pull(cotangent)
    assert (y.dtype, dx.dtype, dscale.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    wide = [a.astype(jnp.float32) for a in (x, scale, cotangent)]
    exact = value_and_pulled(plain_rms_norm, wide[:2], wide[2])
    for mine, truth in zip((y, dx), exact[:2], strict=True):  # one rounding to bf16 at the very end
        np.testing.assert_allclose(mine.astype(jnp.float32), truth, rtol=2**-7, atol=1e-4)
    np.testing.assert_allclose(dscale, exact[2], rtol=1e-4, atol=1e-4)


def test_rms_norm_module_starts_as_the_plain_norm() -> None:
    x = jnp.asarray(norm_inputs()[0][0], jnp.float32)
    y, variables = RMSNorm(24, EPS).init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(np.mean(np.square(y), -1), 1, atol=1e-4)
    assert set(variables["params"]) == {"scale"}
    zero, *grads = value_and_pulled(lambda *a: rms_norm(*a, 1e-6), (jnp.zeros((2, 8)), jnp.ones(8)), jnp.ones((2, 8)))
    assert not np.any(zero) and all(np.all(np.isfinite(g)) for g in grads)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_rate_and_scale(rate: float, dtype: str) -> None:
    x = jnp.full((200, 500), 2.0, dtype)
    y = dropout(x, rate, jax.random.key(3))
    assert y.dtype == x.dtype
    values = np.asarray(y, np.float32)
    assert set(np.unique(values)) == {0.0, np.float32(jnp.asarray(2.0, dtype) / (1 - rate))}
    assert abs((values == 0).mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / values.size)


def test_dropout_gradient_uses_the_same_mask() -> None:
    x, key = jnp.ones((50, 50)), jax.random.key(0)
    y, pull = jax.vjp(lambda x: dropout(x, 0.3, key), x)
    assert np.array_equal(y, pull(jnp.ones_like(x))[0])


def test_dropout_is_the_identity_without_key_or_rate() -> None:
    x = jnp.arange(6.0)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_activations() -> None:
    x = np.linspace(-6, 6, 101)
    erf = 0.5 * x * (1 + np.array([math.erf(v / math.sqrt(2)) for v in x]))
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # openai/gpt-2 src/model.py gelu
    np.testing.assert_allclose(activation("gelu")(jnp.asarray(x)), erf, atol=2e-6)
    np.testing.assert_allclose(activation("gelu_tanh")(jnp.asarray(x)), tanh, atol=2e-6)
    np.testing.assert_allclose(activation("relu")(jnp.asarray(x)), np.maximum(x, 0), atol=1e-7)
    assert np.abs(erf - tanh).max() > 1e-4, "the two differ enough to be told apart"


@pytest.mark.parametrize(
    ("equation", "shape", "bias_shape"),
    [("BTD,DNH->BTNH", (6, 2, 3), (2, 3)), ("BTNH,NHD->BTD", (2, 3, 6), (6,)), ("BD,DC->BC", (6, 5), (5,))],
)
def test_einsum_bias_covers_the_output_dimensions(equation: str, shape: tuple, bias_shape: tuple) -> None:
    letters = dict(zip(equation.split(",")[1].split("->")[0], shape, strict=True)) | {"B": 2, "T": 4}
    x = np.random.default_rng(0).standard_normal([letters[c] for c in equation.split(",")[0]]).astype(np.float32)
    module = Einsum(equation, shape, ("embed",) * len(shape), nn.initializers.normal(1.0))
    params = nn.unbox(module.init(jax.random.key(0), x)["params"])
    assert params["bias"].shape == bias_shape and not params["bias"].any()
    params["bias"] = jnp.arange(math.prod(bias_shape), dtype=jnp.float32).reshape(bias_shape)
    y = module.apply({"params": params}, x)
    expected = np.einsum(equation, x.astype(np.float64), np.asarray(params["kernel"], np.float64)) + params["bias"]
    np.testing.assert_allclose(y, expected, atol=1e-5)
    half = module.apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and params["kernel"].dtype == jnp.float32
    assert "bias" not in module.clone(use_bias=False).init(jax.random.key(0), x)["params"]


def test_embedding_looks_up_and_attends_with_one_table() -> None:
    module = Embedding(7, 4, ("vocab", "embed"), nn.initializers.normal(1.0))
    ids = jnp.array([[0, 6], [3, 3]])
    variables = nn.unbox(module.init(jax.random.key(0), ids, jnp.float32))
    table = np.asarray(variables["params"]["table"])
    rows = module.apply(variables, ids, jnp.bfloat16)
    assert rows.dtype == jnp.bfloat16 and np.array_equal(rows, jnp.asarray(table, jnp.bfloat16)[ids])
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(module.apply(variables, x, method="attend"), x @ table.T, atol=1e-5)
