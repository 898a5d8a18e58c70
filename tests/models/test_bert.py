"""BERT: who sees whom, padding, positions, heads."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.models.bert import Bert, BertConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.masks import segment_mask
from bertgpt_jax.objectives.masked_lm import MaskedLM

FAST_COMPILE = {"xla_backend_optimization_level": 0}
T, V = 8, 23
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 0, 0]])


def config(**changes) -> BertConfig:
    fields = dict(vocab_size=V, max_positions=10, num_layers=2, hidden_size=16, num_heads=2, intermediate_size=24)
    return BertConfig(**fields | {"initializer_range": 0.3} | changes)


def model(**changes) -> Bert:
    return Bert(config(**changes), ComputeConfig(unroll_layers=False))


def inputs(length: int = T, segments=None):
    """Arguments of `Bert.__call__` that ask for every position."""
    rng = np.random.default_rng(0)
    tokens, types = rng.integers(0, V, (1, T))[:, :length], (np.arange(T)[None] >= 3).astype(int)[:, :length]
    every = np.arange(length)[None]
    return tokens, every, types, segment_mask(np.ones((1, length), int) if segments is None else segments), every


def apply(module: Bert, params, *args):
    return jax.jit(lambda p: module.apply({"params": p}, *args), compiler_options=FAST_COMPILE)(params)


def random_params(module: Bert, seed: int = 0):
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs()))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.3, jnp.float32), shapes)


@pytest.fixture(scope="module")
def params():
    return random_params(model())


def test_each_position_attends_both_ways_and_only_within_its_segment(params) -> None:
    module = model()

    def logits(table):
        changed = params | {"position_embedding": {"table": table}}
        return jnp.sum(jnp.sin(module.apply({"params": changed}, *inputs(segments=SEGMENTS))[0][0]), -1)

    table = params["position_embedding"]["table"]
    jacobian = jax.jit(jax.jacrev(logits), compiler_options=FAST_COMPILE)(table)  # [query, table row, D]
    seen = np.any(np.asarray(jacobian) != 0, -1)
    assert np.array_equal(seen[:, :T], SEGMENTS[0][:, None] == SEGMENTS[0][None])
    assert not seen[:, T:].any(), "positions beyond the sequence are not read"


def test_padding_changes_nothing(params) -> None:
    real = 5
    short, short_next = apply(model(), params, *inputs(real))
    segments = (np.arange(T) < real)[None].astype(int)
    tokens, positions, types, mask, every = inputs(segments=segments)
    for filling in (0, 7):
        padded = np.where(np.arange(T) < real, tokens, filling)
        logits, next_logits = apply(model(), params, padded, positions, types, mask, every)
        np.testing.assert_allclose(logits[:, :real], short, atol=2e-5)
        np.testing.assert_allclose(next_logits, short_next, atol=2e-5)


def test_only_the_asked_positions_are_scored(params) -> None:
    tokens, positions, types, mask, every = inputs()
    full, _ = apply(model(), params, tokens, positions, types, mask, every)
    some, _ = apply(model(), params, tokens, positions, types, mask, np.array([[6, 0, 6]]))
    np.testing.assert_allclose(some, full[:, [6, 0, 6]], atol=1e-6)


def test_position_offset_shifts_the_table(params) -> None:
    """RoBERTa's table has rows that no position reads first."""
    shifted = model(position_offset=2)
    table = params["position_embedding"]["table"]
    moved = params | {"position_embedding": {"table": jnp.concatenate([jnp.full((2, 16), jnp.nan), table])}}
    shapes = nn.unbox(jax.eval_shape(shifted.init, jax.random.key(0), *inputs()))["params"]
    assert shapes["position_embedding"]["table"].shape == (12, 16)
    expected, got = apply(model(), params, *inputs()), apply(shifted, moved, *inputs())
    np.testing.assert_array_equal(got[0], expected[0])


def test_absent_types_are_type_zero(params) -> None:
    tokens, positions, types, mask, every = inputs()
    zeros = apply(model(), params, tokens, positions, np.zeros_like(types), mask, every)
    absent = apply(model(), params, tokens, positions, None, mask, every)
    np.testing.assert_array_equal(absent[0], zeros[0])
    assert not np.allclose(zeros[0], apply(model(), params, tokens, positions, types, mask, every)[0])


def test_roberta_has_neither_types_nor_next_sentence() -> None:
    module = model(type_vocab_size=0, next_sentence_head=False)
    params = random_params(module)
    assert not {"type_embedding", "pooler", "next_sentence"} & set(params)
    tokens, positions, _, mask, every = inputs()
    logits, next_logits = apply(module, params, tokens, positions, None, mask, every)
    assert logits.shape == (1, T, V) and next_logits is None


def test_bfloat16_keeps_no_float32_logits_for_the_gradient(params) -> None:
    """Nothing fp32 of [rows, predictions, vocabulary] is saved between the forward and the backward pass."""
    module = Bert(config(next_sentence_head=False), ComputeConfig(dtype="bfloat16", unroll_layers=False))
    small = {k: v for k, v in params.items() if k not in ("pooler", "next_sentence")}
    tokens, positions, types, _, every = inputs()
    batch = {
        "tokens": tokens, "positions": positions, "types": types, "segments": np.ones((1, T), int),
        "mask_positions": every[:, :3], "mask_labels": tokens[:, :3], "mask_weights": np.ones((1, 3), np.float32),
    }  # fmt: skip

    def residuals(params):
        return jax.vjp(lambda p: MaskedLM().loss(module, p, batch, (), jax.random.key(0)).parts["mlm"], params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, small))
    logits = [leaf for leaf in leaves if leaf.shape == (1, 3, V)]
    assert logits and all(leaf.dtype == jnp.bfloat16 for leaf in logits if jnp.issubdtype(leaf.dtype, jnp.floating))
