"""GPT: causality, positions, output dtype."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.config import identity
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import Gpt, GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.masks import causal_mask

FAST_COMPILE = {"xla_backend_optimization_level": 0}
T, V = 7, 19
CONFIG = GptConfig(vocab_size=V, max_positions=9, num_layers=2, hidden_size=16, num_heads=2, intermediate_size=24)
MODEL = Gpt(CONFIG, ComputeConfig(unroll_layers=False))
TOKENS, POSITIONS = np.random.default_rng(0).integers(0, V, (1, T)), np.arange(T)[None]


@pytest.fixture(scope="module")
def params():
    shapes = nn.unbox(jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS, POSITIONS, causal_mask()))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.3, jnp.float32), shapes)


def test_a_position_sees_itself_and_what_precedes_it(params) -> None:
    """By the gradient of the position table, so that no path around the mask can hide."""

    def logits(table):
        changed = params | {"position_embedding": {"table": table}}
        return jnp.sum(jnp.sin(MODEL.apply({"params": changed}, TOKENS, POSITIONS, causal_mask())[0]), -1)

    jacobian = jax.jit(jax.jacrev(logits), compiler_options=FAST_COMPILE)(params["position_embedding"]["table"])
    seen = np.any(np.asarray(jacobian) != 0, -1)
    assert np.array_equal(seen, np.tri(T, 9, dtype=bool))


def test_what_follows_changes_nothing(params) -> None:
    forward = jax.jit(
        lambda tokens: MODEL.apply({"params": params}, tokens, POSITIONS, causal_mask()), compiler_options=FAST_COMPILE
    )
    changed = TOKENS.copy()
    changed[:, 4:] = (changed[:, 4:] + 1) % V
    before, after = forward(TOKENS), forward(changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.all(np.any(before[:, 4:] != after[:, 4:], -1))


def test_bfloat16_logits(params) -> None:
    low = Gpt(CONFIG, ComputeConfig(dtype="bfloat16", unroll_layers=False))
    shape = jax.eval_shape(lambda p: low.apply({"params": p}, TOKENS, POSITIONS, causal_mask()), params)
    assert shape.dtype == jnp.bfloat16 and shape.shape == (1, T, V)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_with_rms_norms_it_has_no_biases_in_them_and_learns(norm_position: str) -> None:
    config = GptConfig(**CONFIG.model_dump() | {"norm": "rms", "norm_position": norm_position})
    model = Gpt(config, ComputeConfig(unroll_layers=False))
    initial = nn.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS, POSITIONS, causal_mask()))["params"]
    count = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (initial, jax.eval_shape(lambda: fresh()))]
    norms = 2 * CONFIG.num_layers + 1
    assert count[1] - count[0] == norms * CONFIG.hidden_size
    assert [set(initial["layers"][name]) for name in ("attention_norm", "feed_forward_norm")] == [{"scale"}] * 2
    assert set(initial["final_norm"]) == {"scale"}

    def loss(params):
        logits = model.apply({"params": params}, TOKENS, POSITIONS, causal_mask())[:, :-1]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], -1))

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def step(params):
        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)

    params, losses = initial, []
    for _ in range(60):
        value, params = step(params)
        losses.append(float(value))
    assert losses[0] > 2.5 and losses[-1] < 0.5 * losses[0], losses
    assert np.any(params["final_norm"]["scale"] != 1)


def fresh() -> dict:
    """Parameters of the model with layer norms."""
    return nn.unbox(MODEL.init(jax.random.key(0), TOKENS, POSITIONS, causal_mask()))["params"]


def test_the_kind_of_norm_is_no_part_of_the_identity_of_models_from_before_it() -> None:
    for kind in (GptConfig, BertConfig):
        assert "norm" not in identity(kind()) and identity(kind(norm="rms"))["norm"] == "rms"
        assert kind.model_validate({k: v for k, v in kind().model_dump().items() if k != "norm"}) == kind()
