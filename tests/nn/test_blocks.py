"""The block and its stack: scanned, unrolled, recomputed and taken apart it is one function."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.nn.blocks import Block, BlockConfig, ComputeConfig, layer_stack, stack, unstack
from bertgpt_jax.nn.masks import AttentionMask, causal_mask

L, B, T, D = 3, 2, 5, 8
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def config(**changes) -> BlockConfig:
    fields = dict(
        num_layers=L, hidden_size=D, num_heads=2, intermediate_size=16, norm_position="post", norm_eps=1e-5,
        activation="gelu", hidden_dropout=0.2, attention_dropout=0.2, initializer="normal", initializer_range=0.3,
        residual_initializer="same",
    )  # fmt: skip
    return BlockConfig(**fields | changes)


def hidden(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((B, T, D)).astype(np.float32)


def make(block: BlockConfig, compute: ComputeConfig | None = None) -> nn.Module:
    return layer_stack(block, compute or ComputeConfig(unroll_layers=False))


@pytest.fixture(scope="module")
def params():
    """Stacked parameters with every leaf random, biases and norms included."""
    shapes = nn.unbox(jax.eval_shape(make(config()).init, jax.random.key(0), hidden(), AttentionMask()))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.3, jnp.float32), shapes)


def run(block: BlockConfig, compute: ComputeConfig, params):
    """Values and gradients, for parameters and input, of one stack with dropout on."""

    def both(params, x):
        def loss(params, x):
            rngs = {"dropout": jax.random.key(7)}
            y, _ = make(block, compute).apply({"params": params}, x, causal_mask(), rngs=rngs)
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (_, y), grads = jax.jit(both, compiler_options=FAST_COMPILE)(params, hidden())
    return y, grads


@pytest.fixture(scope="module")
def reference(params):
    """norm position -> values and gradients of the plain scanned stack."""
    return functools.cache(lambda norm: run(config(norm_position=norm), ComputeConfig(unroll_layers=False), params))


@pytest.mark.parametrize(
    ("norm", "remat", "unroll"),
    [
        ("post", "none", True),
        ("post", "dots", False),
        ("post", "full", False),
        ("pre", "full", True),
        ("post", "gelu", False),
        ("pre", "offload", False),
        ("pre", "gelu", 2),
    ],
)
def test_recomputed_and_unrolled_stacks_are_the_same_function(reference, params, norm, remat, unroll) -> None:
    """Dropout on: its masks must not depend on either."""
    got = run(config(norm_position=norm), ComputeConfig(remat=remat, unroll_layers=unroll), params)
    for mine, truth in zip(jax.tree.leaves(got), jax.tree.leaves(reference(norm)), strict=True):
        np.testing.assert_allclose(mine, truth, rtol=1e-4, atol=2e-5 * max(1.0, np.abs(truth).max()))


@pytest.mark.parametrize("unroll", [False, True])
def test_remat_recomputes(params, unroll: bool) -> None:
    """A remat that silently does nothing would pass every comparison of values."""

    def saved(remat: str) -> int:
        module = make(config(), ComputeConfig(remat=remat, unroll_layers=unroll))

        def residuals(params, x):
            rngs = {"dropout": jax.random.key(0)}
            return jax.vjp(lambda p, x: module.apply({"params": p}, x, causal_mask(), rngs=rngs)[0], params, x)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(residuals, params, hidden())))

    none, gelu, dots, full = (saved(remat) for remat in ("none", "gelu", "dots", "full"))
    assert full < dots < gelu < none, (full, dots, gelu, none)
    assert saved("offload") == full, "the same arrays, wherever they wait"


@pytest.mark.parametrize("unroll", [False, True])
def test_offload_sends_block_inputs_to_the_host_and_back(params, unroll: bool) -> None:
    """Seen in what is traced: on a CPU both memories are one, and compiled programs have no copies."""

    def moves(remat: str) -> list[tuple[str, tuple[int, ...]]]:
        module = make(config(), ComputeConfig(remat=remat, unroll_layers=unroll))

        def loss(params, x):
            rngs = {"dropout": jax.random.key(0)}
            return jnp.sum(module.apply({"params": params}, x, causal_mask(), rngs=rngs)[0])

        found = []
        for equation in equations(jax.make_jaxpr(jax.grad(loss))(params, hidden()).jaxpr):
            if equation.primitive.name == "device_put":
                found += [(str(where), equation.outvars[0].aval.shape) for where in equation.params["devices"]]
        return sorted(found)

    assert moves("offload") == [("MemorySpace.Device", (B, T, D)), ("MemorySpace.Host", (B, T, D))]
    assert moves("full") == moves("none") == []


def equations(jaxpr) -> Iterator:
    """Those of a jaxpr and of all within it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_unstack_and_stack_are_inverse(params) -> None:
    layers = unstack(params)
    assert len(layers) == L
    again = stack(layers)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))


@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_blocks_one_by_one_equal_the_stack(params, norm_position: str) -> None:
    block = config(norm_position=norm_position)
    expected, _ = make(block).apply({"params": params}, hidden(), causal_mask())
    x = jnp.asarray(hidden())
    for layer in unstack(params):
        x, _ = Block(block).apply({"params": layer}, x, causal_mask())
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


def test_layers_start_different() -> None:
    params = nn.unbox(make(config()).init(jax.random.key(0), hidden(), AttentionMask()))["params"]
    kernel = np.asarray(params["attention"]["query"]["kernel"])
    assert kernel.shape == (L, D, 2, D // 2)
    assert not np.array_equal(kernel[0], kernel[1]) and not np.array_equal(kernel[1], kernel[2])


def test_dropout_happens_exactly_with_a_dropout_stream(params) -> None:
    x = hidden()

    def outputs(rate: float):
        module = make(config(hidden_dropout=rate, attention_dropout=rate))
        variables = {"params": params}
        off = jax.jit(lambda x: module.apply(variables, x, AttentionMask())[0], compiler_options=FAST_COMPILE)

        @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
        def on(x, key):
            return module.apply(variables, x, AttentionMask(), rngs={"dropout": key})[0]

        return off(x), *(on(x, jax.random.key(seed)) for seed in (1, 1, 2))

    off, one, same, two = outputs(0.2)
    assert np.array_equal(one, same)
    assert not np.allclose(one, off) and not np.allclose(one, two)
    assert all(np.array_equal(off, y) for y in outputs(0.0)), "rate 0 drops nothing"


def test_every_layer_and_sublayer_draws_its_own_mask(params) -> None:
    """All weights 0 and output biases 1: each of 2L sub-layers adds 0 or 2, so shared masks would show."""
    zero = jax.tree.map(jnp.zeros_like, params)
    zero["attention"]["output"]["bias"] += 1.0
    zero["feed_forward"]["down"]["bias"] += 1.0
    module = make(config(norm_position="pre", hidden_dropout=0.5))
    x = np.zeros((40, T, D), np.float32)
    y, _ = module.apply({"params": zero}, x, AttentionMask(), rngs={"dropout": jax.random.key(0)})
    counts = np.bincount((np.asarray(y).ravel() / 2).astype(int), minlength=2 * L + 1) / y.size
    binomial = np.array([1, 6, 15, 20, 15, 6, 1]) / 64
    np.testing.assert_allclose(counts, binomial, atol=5 * np.sqrt(0.25 / y.size))


def test_bfloat16_keeps_parameters_and_norms_in_float32(params) -> None:
    y, _ = make(config()).apply({"params": params}, hidden().astype(jnp.bfloat16), causal_mask())
    expected, _ = make(config()).apply({"params": params}, hidden(), causal_mask())
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.1)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="hidden_size 8 is not divisible by num_heads 3"):
        config(num_heads=3)
