"""On one device a pipeline computes what the layer stack does: values, gradients, dropout; idle turns add nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn import pipeline
from bertgpt_jax.nn.blocks import ComputeConfig, apply_layers, layer_stack
from bertgpt_jax.nn.masks import causal_mask
from bertgpt_jax.nn.pipeline import Pipeline, PipelineConfig

LAYERS, ROWS, LENGTH, WIDTH = 4, 8, 4, 8
CONFIG = GptConfig(
    vocab_size=16, max_positions=LENGTH, num_layers=LAYERS, hidden_size=WIDTH, num_heads=2, intermediate_size=8
)
COMPUTE = ComputeConfig(unroll_layers=False)
SEGMENTS = jnp.asarray(np.random.default_rng(1).integers(1, 3, (ROWS, LENGTH)), jnp.int32)
X = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)


def through(params, x_BTD, key, laid: Pipeline | None):
    """Outputs of the stack, or of a pipeline over its parameters."""
    stack = layer_stack(CONFIG, COMPUTE)
    rngs = {} if key is None else {"dropout": key}
    if laid is None:
        return stack.apply({"params": params}, x_BTD, causal_mask(SEGMENTS), rngs=rngs)[0]
    return stack.apply(
        {"params": params}, rngs=rngs,
        method=lambda bound: apply_layers(bound, CONFIG, COMPUTE, laid, x_BTD, causal_mask(SEGMENTS)),
    )  # fmt: skip


@functools.cache
def parameters():
    return layer_stack(CONFIG, COMPUTE).init(jax.random.key(0), X, causal_mask(SEGMENTS))["params"]


@functools.cache
def of_the_stack(seed: int):
    """Loss and gradients without a pipeline."""
    return loss_and_gradients(parameters(), jax.random.key(seed), None)


def loss_and_gradients(params, key, laid: Pipeline | None):
    weights = jnp.arange(ROWS, dtype=jnp.float32)[:, None, None]

    def loss(params, x_BTD):
        return jnp.sum(weights * jnp.sin(through(params, x_BTD, key, laid)))

    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, X)
    return lowered.compile({"xla_backend_optimization_level": 0})(params, X)


@pytest.mark.parametrize(
    "laid",
    [Pipeline(4, 1, 4, remat=True), Pipeline(2, 2, 8)],
    ids=["gpipe, recomputed", "circular, 4 groups"],
)
def test_values_and_gradients_are_the_stacks(laid: Pipeline) -> None:
    """With dropout: every row of every layer drops what it drops in the stack."""
    expected = of_the_stack(7)
    found = loss_and_gradients(parameters(), jax.random.key(7), laid)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=1e-5)
    assert abs(float(of_the_stack(8)[0] - found[0])) > 1e-3


def test_without_dropout_rows_come_back_in_their_order() -> None:
    weights = parameters()
    found, expected = through(weights, X, None, Pipeline(2, 1, 4)), through(weights, X, None, None)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_idle_turns_add_nothing() -> None:
    """What a layer makes of nothing (zeros) goes nowhere: neither on to results nor back into gradients."""
    laid, seen = Pipeline(2, 1, 4), jnp.ones((ROWS, LENGTH, WIDTH))

    def layer(params, x_BTD, mask, stream):
        return x_BTD * params["w"] + jnp.where(jnp.all(x_BTD == 0), 1e9 * params["w"], 0.0)

    class Bound:
        variables = {"params": {"w": jnp.full((LAYERS, WIDTH), 2.0)}}

        class scope:
            rngs = {}

    def total(w):
        Bound.variables = {"params": {"w": w}}
        return jnp.sum(pipeline.run_layers(Bound, layer, laid, seen, causal_mask()))

    value, gradient = jax.value_and_grad(total)(jnp.full((LAYERS, WIDTH), 2.0))
    assert float(value) == ROWS * LENGTH * WIDTH * 2.0**LAYERS
    assert np.all(np.asarray(gradient) == ROWS * LENGTH * 2.0 ** (LAYERS - 1))


@pytest.mark.parametrize("laid", [Pipeline(2, 1, 4), Pipeline(4, 1, 8), Pipeline(3, 2, 6), Pipeline(2, 3, 6)])
def test_every_stage_does_every_microbatch_once_a_repeat_in_order(laid: Pipeline) -> None:
    """And a microbatch reaches each group of layers one turn after the one before."""
    count, done = laid.wanted, {}
    for turn in range(laid.iterations(count)):
        for stage in range(laid.stages):
            place = pipeline._place(laid, count, jnp.int32(turn - stage))
            if place.valid:
                microbatch = int(place.group) * laid.stages + int(place.member)
                work = microbatch, int(place.repeat) * laid.stages + stage
                assert work not in done
                done[work] = turn
    groups = laid.stages * laid.repeats
    assert set(done) == {(m, g) for m in range(count) for g in range(groups)}
    assert all(done[m, g + 1] == done[m, g] + 1 for m in range(count) for g in range(groups - 1))
    busy = count * laid.repeats / laid.iterations(count)
    assert laid.idle_share(count) == pytest.approx(1 - busy)


def test_microbatches_that_divide() -> None:
    laid = Pipeline(2, 1, 8, row_shards=3)
    assert [laid.microbatches(rows) for rows in (48, 24, 12, 36, 6, 7)] == [8, 8, 4, 6, 2, 0]


@pytest.mark.parametrize(
    ("fields", "groups"), [({}, 1), (dict(schedule="circular"), 2), (dict(schedule="circular", repeats=3), 3)]
)
def test_groups_of_a_schedule(fields: dict, groups: int) -> None:
    assert PipelineConfig(**fields).groups == groups


@pytest.mark.parametrize("fields", [dict(repeats=2), dict(schedule="circular", repeats=1)])
def test_repeats_must_fit_the_schedule(fields: dict) -> None:
    with pytest.raises(ValidationError, match=f"repeats = {fields['repeats']} with schedule"):
        PipelineConfig(**fields)
