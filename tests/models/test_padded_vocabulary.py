"""A token table with rows for no token: the same losses and gradients, nothing in the rows, nothing of them outside."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.config import build, identity
from bertgpt_jax.models import make_model
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.linear_cross_entropy import linear_cross_entropy
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.parallel.sharding import flatten
from bertgpt_jax.transfer.source import VOCABULARY, without_padding

WORDS, ROWS = 27, 32
SIZES = dict(
    vocab_size=WORDS, max_positions=16, num_layers=1, hidden_size=8, num_heads=2, intermediate_size=16,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def config_of(kind: str, multiple: int, tied: bool = True):
    return (GptConfig if kind == "gpt" else BertConfig)(**SIZES, vocab_multiple=multiple, tied_head=tied)


def batch_of(objective) -> dict[str, np.ndarray]:
    rng, batch = np.random.default_rng(0), {}
    for name, leaf in objective.abstract_batch(4, 16).items():
        high = {"types": 2, "next_labels": 2, "mask_positions": 16}.get(name, WORDS)
        batch[name] = rng.integers(0, high, leaf.shape).astype(leaf.dtype)
    batch["positions"][:] = np.arange(16)
    if "segments" in batch:
        batch["segments"][:] = 1
    return batch


def losses(kind: str, multiple: int, chunk: int | None, tied: bool):
    """(loss, metrics, gradients, parameters) of a fresh model."""
    settings = dict(z_loss=1e-3, label_smoothing=0.1)
    objective = CausalLM(**settings) if kind == "gpt" else MaskedLMNSP(**settings, masking={"rate": 0.25})
    model = make_model(config_of(kind, multiple, tied), ComputeConfig(head_chunk=chunk, unroll_layers=False))
    batch = batch_of(objective)
    params = nn.unbox(model.init(jax.random.key(0), *objective.model_inputs(batch))["params"])

    def differentiate(params):
        def total(params):
            sums = objective.loss(model, params, batch, (), None)
            return sum(sums.parts.values()), sums.metrics

        return jax.value_and_grad(total, has_aux=True)(params)

    compiled = jax.jit(differentiate).lower(params).compile(compiler_options={"xla_backend_optimization_level": 0})
    (loss, metrics), grads = compiled(params)
    return loss, metrics, flatten(grads), flatten(params)


def slowly(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "tied", "chunk"),
    [
        ("gpt", True, None),
        slowly("bert", True, 4),
        slowly("gpt", True, 4),
        slowly("bert", True, None),
        *(slowly(kind, False, chunk) for kind in ("gpt", "bert") for chunk in (None, 4)),
    ],
)
def test_padding_changes_nothing(kind: str, tied: bool, chunk: int | None) -> None:
    """Smoothing and z-loss are on; the rows that are tokens are drawn alike."""
    plain, padded = losses(kind, 1, chunk, tied), losses(kind, ROWS, chunk, tied)
    np.testing.assert_allclose(padded[0], plain[0], rtol=1e-6)
    for name, value in plain[1].items():
        np.testing.assert_array_equal(padded[1][name], value)
    for name in plain[2]:
        for mine, theirs in ((padded[2][name], plain[2][name]), (padded[3][name], plain[3][name])):
            np.testing.assert_allclose(mine[: len(theirs)], theirs, rtol=2e-5, atol=2e-6)
            assert mine.shape[0] == ROWS or name not in VOCABULARY
            assert not np.any(mine[len(theirs) :]), "no number and no gradient"


def test_chunks_leave_padding_out() -> None:
    """The chunked head on a table with empty rows, and on the same without: sums and gradients."""
    rng = np.random.default_rng(0)
    x, table = rng.standard_normal((2, 4, 8), np.float32), rng.standard_normal((WORDS, 8), np.float32)
    labels, weights = rng.integers(0, WORDS, (2, 4)), np.ones((2, 4), np.float32)
    padded = np.concatenate([table, np.full((ROWS - WORDS, 8), 3, np.float32)])

    def total(x, table):
        found = linear_cross_entropy(
            x, table, None, labels, weights, chunk=2, z_loss=0.01, label_smoothing=0.1, words=WORDS
        )
        return found.loss, found.right

    results = [jax.value_and_grad(total, (0, 1), has_aux=True)(x, t) for t in (table, padded)]
    ((loss, right), (dx, dtable)), ((loss_p, right_p), (dx_p, dtable_p)) = results
    np.testing.assert_allclose(loss_p, loss, rtol=1e-6)
    assert right == right_p
    np.testing.assert_allclose(dx_p, dx, atol=1e-6)
    np.testing.assert_allclose(dtable_p[:WORDS], dtable, atol=1e-6)
    assert not np.any(dtable_p[WORDS:])


def test_what_is_no_word_never_wins() -> None:
    """Every true logit is negative, those of the empty rows would be 0."""
    config = config_of("gpt", ROWS)
    model = make_model(config, ComputeConfig(unroll_layers=False))
    ids = jnp.zeros((1, 4), jnp.int32)
    params = nn.unbox(
        model.init(jax.random.key(0), *CausalLM().model_inputs({"tokens": ids, "positions": ids}))["params"]
    )
    table = jnp.where(jnp.arange(ROWS)[:, None] < WORDS, -1.0, 0.0) * jnp.ones((1, 8))
    params["token_embedding"]["table"] = table
    for dtype in (jnp.float32, jnp.bfloat16):
        logits = model.apply({"params": params}, jnp.ones((1, 4, 8), dtype), method="logits")
        assert logits.shape[-1] == ROWS and int(jnp.max(jnp.argmax(logits, -1))) < WORDS
        assert float(jnp.max(jax.nn.softmax(logits.astype(jnp.float32))[..., WORDS:])) == 0.0


def test_identity_and_ranges() -> None:
    assert "vocab_multiple" not in identity(config_of("gpt", 1))
    assert identity(config_of("gpt", 128))["vocab_multiple"] == 128
    assert config_of("bert", 128).vocab_rows == 128 and config_of("bert", 1).vocab_rows == WORDS
    with pytest.raises(ValueError, match="vocab_multiple"):
        build(GptConfig, SIZES | {"vocab_multiple": 0}, "test")


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_exports_leave_the_rows_out(kind: str) -> None:
    """What leaves a run (export, generation, another run) sees the model without padding."""
    spec = importlib.util.spec_from_file_location("sources", Path(__file__).parents[1] / "transfer" / "conftest.py")
    sources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sources)
    padded = sources.random_source(config_of(kind, ROWS, tied=False))
    plain = without_padding(padded)
    assert plain.model_config == config_of(kind, 1, tied=False)
    arrays, whole = plain.read(list(plain.leaves)), padded.read(list(padded.leaves))
    for path, (_, shape) in plain.leaves.items():
        assert arrays[path].shape == shape == (WORDS if path in VOCABULARY else shape[0], *shape[1:])
        np.testing.assert_array_equal(arrays[path], whole[path][: shape[0]])
    assert without_padding(plain) is plain
