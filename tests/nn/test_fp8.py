"""Products of 8-bit operands: rounded as ml_dtypes rounds, in the very places, under every way to run the layers."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bertgpt_jax.models import make_model
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import BlockConfig, ComputeConfig, apply_layers, layer_stack
from bertgpt_jax.nn.fp8 import BACKWARD, FORWARD, dequantize, dot_general, quantize
from bertgpt_jax.nn.layers import Einsum
from bertgpt_jax.nn.masks import causal_mask
from bertgpt_jax.nn.pipeline import Pipeline
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP

MOST = {FORWARD: 448.0, BACKWARD: 57344.0}
NUMPY = {FORWARD: ml_dtypes.float8_e4m3fn, BACKWARD: ml_dtypes.float8_e5m2}
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def rounded(x: np.ndarray, dtype) -> np.ndarray:
    """float64 x as numbers of 8 bits and a power of two represent it."""
    scale = 2.0 ** math.ceil(math.log2(np.abs(x).max() / MOST[dtype]))
    return (x / scale).astype(np.float32).astype(NUMPY[dtype]).astype(np.float64) * scale


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("wide", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD], ids=["e4m3", "e5m2"])
def test_quantize_rounds_as_ml_dtypes(dtype, wide: str) -> None:
    rng = np.random.default_rng(0)
    both = jax.jit(lambda x: (*(pair := quantize(x, dtype)), dequantize(*pair, x.dtype)))
    for size in (1e-30, 3e-5, 1.0, 700.0, 1e30):
        x = jnp.asarray(size * rng.standard_normal((40, 50)) * 10 ** rng.uniform(-4, 1, (40, 50)), wide)
        q, scale, back = both(x)
        exact = np.asarray(x, np.float64)
        assert q.dtype == dtype and scale.dtype == jnp.float32 and scale.shape == () and back.dtype == x.dtype
        assert math.log2(scale).is_integer()
        expected = rounded(exact, dtype)
        assert MOST[dtype] / 2 < np.abs(exact).max() / scale <= MOST[dtype]
        np.testing.assert_array_equal(np.asarray(q, np.float64) * float(scale), expected)
        np.testing.assert_array_equal(np.asarray(back, np.float64), expected)
        assert not np.array_equal(expected, exact)


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD], ids=["e4m3", "e5m2"])
def test_the_scale_grows_where_the_range_ends(dtype) -> None:
    for power in (-100, -3, 0, 50):
        edge = np.float32(MOST[dtype] * 2.0**power)
        above = np.nextafter(edge, np.float32(np.inf))
        for largest, expected in ((edge, power), (above, power + 1)):
            q, scale = quantize(jnp.array([largest, -largest / 3]), dtype)
            assert math.log2(scale) == expected
            assert np.isfinite(np.asarray(q, np.float32)).all()


def test_zeros_tiny_and_huge_numbers_stay_finite() -> None:
    for value in (0.0, 1e-45, np.finfo(np.float32).tiny, 3e38):
        for dtype in (FORWARD, BACKWARD):
            q, scale = jax.jit(quantize, static_argnums=1)(jnp.full((4,), value), dtype)
            assert np.isfinite(np.asarray(q, np.float32)).all() and 0 < scale < np.inf
            assert abs(float(dequantize(q, scale, jnp.float32)[0]) - value) <= 2.0**-4 * value + 2e-38


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    x, kernel = np.ones((2, 4), np.float32), np.ones((4, 3), np.float32)
    x[1, 2] = bad
    y, pull = jax.vjp(lambda *a: dot_general(*a, ((1,), (0,))), jnp.asarray(x), jnp.asarray(kernel))
    assert np.isnan(y[1]).all()
    assert all(not np.isfinite(g).all() for g in pull(jnp.full((2, 3), bad)))
    assert np.isnan(pull(jnp.ones((2, 3)))[1]).any(), "an update made of it is skipped"


# ---------------------------------------------------------------- products


CASES = {
    "query": ("BTD,DNH->BTNH", (6, 2, 3)),
    "output": ("BTNH,NHD->BTD", (2, 3, 6)),
    "up": ("BTD,DF->BTF", (6, 5)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_a_linear_map_is_the_product_of_rounded_operands(name: str, dtype: str) -> None:
    equation, shape = CASES[name]
    left, right, out = equation.replace("->", ",").split(",")
    sizes = dict(zip(right, shape, strict=True)) | {"B": 2, "T": 4}
    rng = np.random.default_rng(0)

    def draw(letters: str, size: float, dtype: str) -> jax.Array:
        return jnp.asarray(size * rng.standard_normal([sizes[letter] for letter in letters]), dtype)

    x, kernel, dy = draw(left, 3.0, dtype), draw(right, 0.02, "float32"), draw(out, 1e-6, dtype)
    axes = ("embed",) * len(shape)
    module = Einsum(equation, shape, axes, nn.initializers.normal(1.0), use_bias=False, matmul="fp8")

    @jax.jit
    def all_three(x, kernel, dy):
        y, pull = jax.vjp(lambda x, kernel: module.apply({"params": {"kernel": kernel}}, x), x, kernel)
        return y, *pull(dy)

    y, dx, dkernel = all_three(x, kernel, dy)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (x.dtype, x.dtype, jnp.float32)
    wide = [np.asarray(a, np.float64) for a in (x, kernel, dy)]
    x8, kernel8 = (rounded(a, FORWARD) for a in wide[:2])
    dy8 = rounded(wide[2], BACKWARD)
    expected = (
        np.einsum(equation, x8, kernel8),
        np.einsum(f"{out},{right}->{left}", dy8, kernel8),
        np.einsum(f"{left},{out}->{right}", x8, dy8),
    )
    plain = np.einsum(equation, *wide[:2])
    tolerance = 1e-6 if dtype == "float32" else 2**-8
    for mine, truth in zip((y, dx, dkernel), expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(mine, np.float64), truth, rtol=tolerance, atol=tolerance * abs(truth).max()
        )
    assert np.abs(plain - expected[0]).max() > 2 * tolerance * np.abs(plain).max(), "rounding is not lost in tolerance"


def test_the_backward_pass_keeps_8_bits() -> None:
    x, kernel = jnp.ones((4, 6), jnp.bfloat16), jnp.ones((6, 3))
    _, pull = jax.vjp(lambda *a: dot_general(*a, ((1,), (0,))), x, kernel)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.ndim]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [((4, 6), FORWARD), ((6, 3), FORWARD)]


# ---------------------------------------------------------------- the layers


SIZES = dict(num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32, hidden_dropout=0.0, attention_dropout=0.0)


def converted(kind: str, remat: str = "none") -> tuple[int, int]:
    """Tensors rounded to 8 bits in one layer's forward and backward pass, as it stands in the lowered program."""
    config = (BertConfig if kind == "bert" else GptConfig)(**SIZES, vocab_size=24, max_positions=8)
    objective = MaskedLMNSP() if kind == "bert" else CausalLM()
    model = make_model(config, ComputeConfig(matmul="fp8", unroll_layers=False, remat=remat))
    batch = objective.abstract_batch(2, 8)
    inputs = jax.eval_shape(objective.model_inputs, batch)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]

    def loss(params, batch):
        return sum(objective.loss(model, params, batch, (), None).parts.values())

    text = jax.jit(jax.grad(loss)).lower(params, batch).as_text()
    made = [line for line in text.splitlines() if "stablehlo.convert" in line]
    return tuple(sum(line.rstrip().endswith(f"x{name}>") for line in made) for name in ("f8E4M3FN", "f8E5M2"))


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_only_the_six_maps_of_a_layer_are_in_8_bits(kind: str) -> None:
    """Not embeddings, heads, pooler or attention scores."""
    assert converted(kind) == (6 + 6, 6)


def block(norm_position: str = "pre") -> BlockConfig:
    return BlockConfig(
        **SIZES, norm_position=norm_position, norm_eps=1e-5, activation="gelu", initializer="normal",
        initializer_range=0.1, residual_initializer="same",
    )  # fmt: skip


def run(pipeline: Pipeline | None = None, **compute) -> np.ndarray:
    """Values and gradients of a stack, in one vector."""
    config, settings = block(), ComputeConfig(**{"unroll_layers": False} | compute)
    x = np.random.default_rng(0).standard_normal((4, 8, 16)).astype(np.float32)
    stack = layer_stack(config, settings)
    params = nn.unbox(stack.init(jax.random.key(0), x, causal_mask()))

    def loss(params, x):
        bound = stack.bind(params)
        y = apply_layers(bound, config, settings, pipeline, x.astype(settings.dtype), causal_mask())
        return jnp.mean(jnp.square(y.astype(jnp.float32) - 1)), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE)(params, x)
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves((y, grads))])


@pytest.fixture(scope="module")
def reference():
    return functools.cache(lambda matmul: run(matmul=matmul))


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


SAME = 0.003
"""Programs that round otherwise in their last fp32 bit push a few operands over to the next 8-bit number."""


def test_rounding_shows(reference) -> None:
    assert 4 * SAME < distance(reference("fp8"), reference("same")) < 0.2


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [
        pytest.param("none", True, marks=pytest.mark.slow),
        pytest.param("gelu", False, marks=pytest.mark.slow),
        pytest.param("dots", False, marks=pytest.mark.long),
        pytest.param("full", 2, marks=pytest.mark.long),
    ],
)
def test_recomputed_and_unrolled_it_is_the_same(reference, remat: str, unroll: bool | int) -> None:
    assert distance(run(matmul="fp8", remat=remat, unroll_layers=unroll), reference("fp8")) < SAME


@pytest.mark.slow
def test_in_a_pipeline_each_part_has_its_own_scale(reference) -> None:
    piped = run(Pipeline(stages=2, repeats=1, wanted=2), matmul="fp8")
    assert distance(piped, reference("same")) < 0.2


@pytest.mark.slow
def test_bfloat16_layers(reference) -> None:
    got = run(matmul="fp8", dtype="bfloat16")
    assert distance(got, reference("fp8")) < 0.1
