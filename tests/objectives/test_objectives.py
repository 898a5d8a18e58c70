"""Loss parts as sums with weights: exact under microbatches, and without harm where a part has no weight."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.models.bert import Bert, BertConfig
from bertgpt_jax.models.gpt import Gpt, GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.base import is_best, total_loss
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm import MaskedLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.training.step import gradients, means, split_microbatches

FAST_COMPILE = {"xla_backend_optimization_level": 0}
ROWS, T, V = 8, 16, 23
SIZES = dict(
    vocab_size=V, max_positions=T, num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32,
    hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.2,
)  # fmt: skip
COMPUTE = ComputeConfig(unroll_layers=False)
BERT, GPT = Bert(BertConfig(**SIZES), COMPUTE), Gpt(GptConfig(**SIZES), COMPUTE)
PAIRS = MaskedLMNSP(masked_coefficient=1.5, next_coefficient=0.5)


@functools.cache
def batch_of(objective) -> dict[str, np.ndarray]:
    """Weights differ by row, so that a mean of microbatch means would be wrong."""
    rng = np.random.default_rng(0)
    highs = {"types": 2, "next_labels": 2, "mask_positions": T}
    batch = {}
    for name, leaf in objective.abstract_batch(ROWS, T).items():
        batch[name] = rng.integers(0, highs.get(name, V), leaf.shape).astype(leaf.dtype)
        if name.endswith("weights"):
            share = np.linspace(0.1, 1, ROWS).reshape(-1, *[1] * (len(leaf.shape) - 1))
            batch[name] = (rng.random(leaf.shape) < share).astype(np.float32)
    batch["positions"][:] = np.arange(T)
    if "segments" in batch:
        batch["segments"][:] = np.arange(T) < rng.integers(6, T + 1, (ROWS, 1))
    return batch


@functools.cache
def params_of(model, objective):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *objective.model_inputs(batch_of(objective)))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.2, jnp.float32), nn.unbox(shapes))


@functools.cache
def compiled(model, objective, count: int):
    """(params, batch, key) -> (gradients, part sums, metric sums, carry)."""

    def run(params, batch, key):
        return gradients(model, objective, params, batch, (), key, count)

    return jax.jit(run, compiler_options=FAST_COMPILE)


@pytest.mark.parametrize(("model", "objective"), [(BERT, PAIRS), (GPT, CausalLM())], ids=["bert", "gpt"])
def test_microbatches_give_the_same_gradient(model, objective) -> None:
    params, batch = params_of(model, objective), batch_of(objective)
    whole = compiled(model, objective, 1)(params, batch, None)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(whole[0])))
    for count in (2, 4):
        grads, parts, metrics, _ = compiled(model, objective, count)(params, batch, None)
        difference = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, grads, whole[0])
        assert np.sqrt(sum(np.sum(d**2) for d in jax.tree.leaves(difference))) <= 1e-6 * norm
        for mine, all_ in ((parts, whole[1]), (metrics, whole[2])):
            assert mine.keys() == all_.keys()
            for name in mine:
                np.testing.assert_allclose(mine[name], all_[name], rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"z_loss": 1e-3, "label_smoothing": 0.1}], ids=["plain", "smoothed"])
@pytest.mark.parametrize(("make", "model"), [(MaskedLMNSP, BERT), (CausalLM, GPT)], ids=["bert", "gpt"])
def test_a_head_in_chunks_is_the_same_function(make, model, settings) -> None:
    objective = make(**settings)
    chunked = type(model)(model.config, ComputeConfig(unroll_layers=False, head_chunk=1))
    params, batch = params_of(model, objective), batch_of(objective)
    want, got = (compiled(m, objective, 2)(params, batch, jax.random.key(0)) for m in (model, chunked))
    for mine, truth in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, truth, rtol=2e-5, atol=1e-5)


def test_microbatches_take_rows_in_turn() -> None:
    parts = split_microbatches({"a": np.arange(8)}, 2)
    assert parts["a"].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_parts_are_sums_over_rows_of_the_plain_losses() -> None:
    params, batch = params_of(BERT, PAIRS), batch_of(PAIRS)
    _, parts, metrics, _ = compiled(BERT, PAIRS, 1)(params, batch, None)
    inputs = PAIRS.model_inputs(batch)
    logits, next_logits = (np.asarray(x, np.float64) for x in BERT.apply({"params": params}, *inputs))

    def summed(logits, labels, weights):
        log_p = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
        picked = np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
        return -np.sum(picked * weights), np.sum((np.argmax(logits, -1) == labels) * weights)

    masked = summed(logits, batch["mask_labels"], batch["mask_weights"])
    following = summed(next_logits, batch["next_labels"], batch["next_weights"])
    np.testing.assert_allclose([parts["mlm"], metrics["mlm_accuracy"]], masked, rtol=1e-5)
    np.testing.assert_allclose([parts["nsp"], metrics["nsp_accuracy"]], following, rtol=1e-5)
    weights = PAIRS.weights(batch)
    expected = 1.5 * masked[0] / batch["mask_weights"].sum() + 0.5 * following[0] / batch["next_weights"].sum()
    np.testing.assert_allclose(total_loss(PAIRS, parts, weights), expected, rtol=1e-5)
    found = means(PAIRS, parts, metrics, weights)
    assert set(found) == {"loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy"}
    np.testing.assert_allclose(found["nsp_accuracy"], following[1] / batch["next_weights"].sum(), rtol=1e-6)


@pytest.mark.parametrize("empty", [("next_weights",), ("mask_weights",), ("mask_weights", "next_weights")])
def test_a_part_without_weight_contributes_nothing(empty: tuple) -> None:
    batch = batch_of(PAIRS) | {name: np.zeros_like(batch_of(PAIRS)[name]) for name in empty}
    grads, parts, metrics, _ = compiled(BERT, PAIRS, 1)(params_of(BERT, PAIRS), batch, None)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((grads, parts, metrics)))
    weights = PAIRS.weights(batch)
    found = means(PAIRS, parts, metrics, weights)
    used = {"mask_weights": ("mlm", 1.5), "next_weights": ("nsp", 0.5)}
    expected = sum(c * float(parts[p] / weights[p]) for name, (p, c) in used.items() if name not in empty)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-6)
    if "next_weights" in empty:
        assert found["nsp_loss"] == 0 and not np.any(grads["next_sentence"]["kernel"])
    if len(empty) == 2:
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_rows_without_weight_do_not_count() -> None:
    """Padding rows of an evaluation's last batch: other contents give the same sums."""
    batch = {name: array.copy() for name, array in batch_of(PAIRS).items()}
    batch["mask_weights"][-2:] = 0
    batch["next_weights"][-2:] = 0
    other = {name: array.copy() for name, array in batch.items()}
    other["tokens"][-2:] = 1
    other["segments"][-2:] = 0
    run = compiled(BERT, PAIRS, 1)
    one, two = (run(params_of(BERT, PAIRS), b, None) for b in (batch, other))
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", [PAIRS, MaskedLM(), CausalLM()], ids=lambda o: o.kind)
def test_names_agree(objective) -> None:
    """Every part has a coefficient and a weight, every metric a part to be divided by."""
    model = GPT if objective.kind == "causal_lm" else BERT
    abstract = objective.abstract_batch(ROWS, T)
    params = params_of(model, PAIRS if model is BERT else objective)
    sums = jax.eval_shape(lambda p, b: objective.loss(model, p, b, (), None), params, abstract)
    weights = jax.eval_shape(objective.weights, abstract)
    assert set(sums.parts) == set(objective.coefficients()) == set(weights)
    assert set(sums.metrics) == set(objective.metric_parts())
    assert set(objective.metric_parts().values()) <= set(sums.parts)
    assert all(leaf.dtype == jnp.float32 and leaf.shape == () for leaf in jax.tree.leaves((sums.parts, sums.metrics)))


def test_accuracy_counts_the_largest_logit() -> None:
    logits = jnp.array([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0], [-2.0, -1.0, -3.0]])
    assert is_best(logits, jnp.array([1, 1, 0])).tolist() == [1.0, 1.0, 0.0]
