"""The loss of packed rows is the sum of the losses of their segments, each computed in a row of its own."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.packing import PackedDocuments, PackedPairs
from bertgpt_jax.corpus.view import InMemoryCorpus
from bertgpt_jax.models.bert import Bert, BertConfig
from bertgpt_jax.models.gpt import Gpt, GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm import MaskedLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP

FAST_COMPILE = {"xla_backend_optimization_level": 0}
T, ROWS, V = 32, 6, 40
SIZES = dict(
    vocab_size=V, max_positions=T, num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32,
    hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.3,
)  # fmt: skip
COMPUTE = ComputeConfig(unroll_layers=False)
BERT, GPT = Bert(BertConfig(**SIZES), COMPUTE), Gpt(GptConfig(**SIZES), COMPUTE)
CASES = {
    "causal": (GPT, CausalLM(examples=PackedDocuments()), CausalLM()),
    "masked": (BERT, MaskedLM(examples=PackedDocuments(), masking=Masking(rate=0.4)), MaskedLM()),
    "pairs": (BERT, MaskedLMNSP(examples=PackedPairs(max_segments=5), masking=Masking(rate=0.4)), MaskedLMNSP()),
}
BY_TOKEN = ("tokens", "positions", "types", "targets", "weights")


@functools.cache
def packed_batch(case: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    documents = [[rng.integers(6, V, n).tolist() for n in rng.integers(1, 6, rng.integers(2, 5))] for _ in range(60)]
    objective = CASES[case][1]
    data = Dataset(
        InMemoryCorpus(documents, V), objective.examples, objective.masking, sequence_length=T, batch_size=ROWS
    )
    return data.batch(0)


def alone(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A row for every segment, at the row's start, with what is predicted of it; positions count from 0 there."""
    rows, segments = [], [(row, s + 1) for row in range(ROWS) for s in range(batch["segments"][row].max())]
    for r, s in segments:
        inside = np.flatnonzero(batch["segments"][r] == s)
        row = {"segments": (np.arange(T) < len(inside)).astype(np.int32), "positions": np.arange(T, dtype=np.int32)}
        for name in BY_TOKEN:
            if name in batch and name != "positions":
                row[name] = np.zeros_like(batch[name][r])
                row[name][: len(inside)] = batch[name][r][inside]
        if "mask_weights" in batch:
            row |= {name: batch[name][r] for name in ("mask_labels", "mask_positions", "mask_weights")}
            mine = np.isin(row["mask_positions"], inside) & (row["mask_weights"] > 0)
            row["mask_positions"] = np.where(mine, row["mask_positions"] - inside[0], 0)
            row["mask_weights"] = mine.astype(np.float32)
        if "next_labels" in batch:
            row |= {name: batch[name][r, s - 1] for name in ("next_labels", "next_weights")}
        rows.append(row)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def params_of(model, objective, batch):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *objective.model_inputs(batch))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.3, jnp.float32), nn.unbox(shapes))


@pytest.mark.parametrize("case", CASES)
def test_packed_losses_and_gradients_are_the_sums_of_those_alone(case: str) -> None:
    model, objective, plain = CASES[case]
    batch = packed_batch(case)
    assert batch["segments"].max(1).mean() >= 2
    params = params_of(model, objective, batch)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
    def sums(objective, params, batch):
        def total(params):
            found = objective.loss(model, params, batch, (), None)
            return sum(found.parts.values()), found

        (_, found), grads = jax.value_and_grad(total, has_aux=True)(params)
        return found.parts | found.metrics, grads, objective.weights(batch)

    together, apart = sums(objective, params, batch), sums(plain, params, alone(batch))
    assert {name: float(w) for name, w in together[2].items()} == {name: float(w) for name, w in apart[2].items()}
    for name, value in together[0].items():
        np.testing.assert_allclose(value, apart[0][name], rtol=2e-5, err_msg=name)
    assert float(together[0]["nsp" if case == "pairs" else "lm" if case == "causal" else "mlm"]) > 1
    difference = jax.tree.map(lambda a, b: np.sum((np.asarray(a, np.float64) - b) ** 2), together[1], apart[1])
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(apart[1])))
    assert np.sqrt(sum(jax.tree.leaves(difference))) <= 1e-5 * norm


@pytest.mark.parametrize("case", CASES)
def test_a_batch_has_the_shapes_that_were_promised(case: str) -> None:
    batch, promised = packed_batch(case), CASES[case][1].abstract_batch(ROWS, T)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in promised.items()
    }


def test_plain_batches_keep_their_arrays() -> None:
    assert "segments" not in CausalLM().abstract_batch(2, T)
    assert "cls_positions" not in MaskedLMNSP().abstract_batch(2, T)
    assert MaskedLMNSP().abstract_batch(2, T)["next_labels"].shape == (2,)
