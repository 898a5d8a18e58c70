"""The check of packed rows finds nothing in the models as they are, and something in a model that leaks."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.packing import PackedDocuments, PackedPairs
from bertgpt_jax.batches.pairs import SentencePairs
from bertgpt_jax.batches.windows import Windows
from bertgpt_jax.corpus.view import InMemoryCorpus
from bertgpt_jax.errors import DataError
from bertgpt_jax.evaluation import leaks
from bertgpt_jax.models.bert import Bert, BertConfig
from bertgpt_jax.models.gpt import Gpt, GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.nn.splash import LANES
from bertgpt_jax.objectives import causal_lm, masked_lm
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm import MaskedLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP

T, V = 24, 40
SIZES = dict(vocab_size=V, max_positions=T, num_layers=1, hidden_size=16, num_heads=2, intermediate_size=32)
COMPUTE = ComputeConfig(unroll_layers=False)
BERT, GPT = Bert(BertConfig(**SIZES), COMPUTE), Gpt(GptConfig(**SIZES), COMPUTE)
CASES = {
    "causal": (GPT, CausalLM(examples=PackedDocuments())),
    "masked": (BERT, MaskedLM(examples=PackedDocuments())),
    "pairs": (BERT, MaskedLMNSP(examples=PackedPairs())),
    "plain pairs": (BERT, MaskedLMNSP()),
}
REGULAR = np.arange(V) > 5


@functools.cache
def corpus() -> InMemoryCorpus:
    rng = np.random.default_rng(0)
    return InMemoryCorpus(
        [[rng.integers(6, V, n).tolist() for n in rng.integers(1, 4, rng.integers(2, 5))] for _ in range(40)], V
    )


def batch_of(objective, length: int = T) -> dict[str, np.ndarray]:
    rows = 4 if length == T else 2
    data = Dataset(corpus(), objective.examples, objective.masking, sequence_length=length, batch_size=rows)
    return leaks.rows_to_check(data.batch, objective.examples, 2)


def params_of(model, objective, batch):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *objective.model_inputs(batch))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), nn.unbox(shapes))


def check(case: str, model=None, length: int = T, **more) -> list[leaks.Leak]:
    objective = CASES[case][1]
    model, batch = model or CASES[case][0], batch_of(objective, length)
    params = params_of(model, objective, batch)
    return leaks.find_leaks(leaks.observer(model, objective), params, batch, objective.examples, REGULAR, **more)


def splash_model(case: str):
    """The model of a case in sizes that the kernel takes, which is emulated."""
    sizes = SIZES | {"max_positions": LANES, "hidden_size": 64, "num_heads": 1}
    compute = ComputeConfig(unroll_layers=False, attention="splash", emulate=True)
    return Gpt(GptConfig(**sizes), compute) if case == "causal" else Bert(BertConfig(**sizes), compute)


@pytest.mark.parametrize("case", ["pairs", *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c != "pairs")])
def test_nothing_leaks(case: str) -> None:
    found = check(case)
    assert len(found) == (2 if case == "plain pairs" else 3) and not any(found)
    assert len({leak.perturbed for leak in found}) == len(found)


@pytest.mark.parametrize("case", ["pairs", *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c != "pairs")])
def test_nothing_leaks_through_splash(case: str) -> None:
    found = check(case, splash_model(case), LANES, trials=2)
    assert len(found) == 2 and not any(found)


@pytest.mark.slow
def test_a_leak_through_splash_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_lm, "segment_mask", lambda segments, packed, max_segments: AttentionMask())
    (leak,) = check("masked", splash_model("masked"), LANES, trials=1)
    assert leak.outputs and leak.gradients and leak.losses and leak.reached


@pytest.mark.slow
def test_a_mask_that_ignores_segments_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of the row see the perturbed segment, in whichever direction the mask lets them; other rows do not."""
    monkeypatch.setattr(masked_lm, "segment_mask", lambda segments, packed, max_segments: AttentionMask())
    for leak in check("masked"):
        row, segment = leak.perturbed
        others = {s for s in np.unique(batch_of(CASES["masked"][1])["segments"][row]).tolist() if s != segment}
        assert set(leak.outputs) == {(row, s) for s in others}
        assert {r for r, _ in leak.gradients} == {row} and leak.losses and leak.reached and bool(leak)

    monkeypatch.setattr(causal_lm, "causal_mask", lambda segments, max_segments: AttentionMask(causal=True))
    found = check("causal")
    assert all(leak for leak in found)
    for leak in found:
        row, segment = leak.perturbed
        assert leak.outputs and all(r == row and (s > segment or s == 0) for r, s in leak.outputs)


@pytest.mark.slow
def test_a_leak_of_gradients_alone_is_found() -> None:
    """Outputs that stay the same do not hide that the others' losses depend on the perturbed segment."""
    model, objective = CASES["masked"]
    batch = batch_of(objective)

    class Mixing(MaskedLM):
        def loss(self, model, params, batch, carry, key):
            sums = super().loss(model, params, batch, carry, key)
            x = model.apply({"params": params}, *self.model_inputs(batch)[:4], method="encode")
            return sums._replace(parts={"mlm": sums.parts["mlm"] + (x - jax.lax.stop_gradient(x)).sum()})

    params = params_of(model, objective, batch)
    mixing = Mixing(examples=objective.examples)
    (leak,) = leaks.find_leaks(leaks.observer(model, mixing), params, batch, mixing.examples, REGULAR, trials=1)
    assert leak.reached and not leak.outputs and not leak.gradients


def test_weights_of_the_perturbed_segment_are_taken_away() -> None:
    batch = batch_of(CASES["pairs"][1])
    inside = (batch["segments"] == 2) & (np.arange(2) == 0)[:, None]
    changed = leaks.without_weight(batch, inside)
    assert changed["next_weights"].sum() == batch["next_weights"].sum() - 1 and changed["next_weights"][0, 1] == 0
    gone = np.take_along_axis(inside, batch["mask_positions"], 1) & (batch["mask_weights"] > 0)
    assert gone.any() and (changed["mask_weights"] == batch["mask_weights"] * ~gone).all()
    plain = batch_of(CASES["plain pairs"][1])
    changed = leaks.without_weight(plain, np.arange(2)[:, None] == np.ones((1, T)))
    assert changed["next_weights"].tolist() == [1, 0] and not changed["mask_weights"][1].any()
    causal = batch_of(CASES["causal"][1])
    changed = leaks.without_weight(causal, causal["segments"] == 1)
    assert (changed["weights"] == (causal["segments"] > 1)).all()


def test_rows_with_many_segments_are_chosen() -> None:
    objective = CASES["masked"][1]
    data = Dataset(corpus(), objective.examples, objective.masking, sequence_length=T, batch_size=4)
    most = sorted(data.batch(0)["segments"].max(1).tolist(), reverse=True)[:2]
    assert batch_of(objective)["segments"].max(1).tolist() == most and most[0] > 2


def test_what_cannot_be_checked_is_said() -> None:
    long = InMemoryCorpus([[[7] * 22]] * 40, V)
    data = Dataset(long, PackedDocuments(), Masking(), sequence_length=T, batch_size=4)
    with pytest.raises(DataError, match="no row of the first 16 batches holds two segments"):
        leaks.rows_to_check(data.batch, data.examples, 2)
    one = Dataset(corpus(), Windows(), None, sequence_length=T, batch_size=1).batch(0)
    with pytest.raises(DataError, match="1 rows has 1 segments"):
        leaks.find_leaks(lambda *_: None, {}, one, Windows(), REGULAR)
    silent = (np.zeros((2, T, 4)), {"mlm": np.zeros(())}, np.zeros((2, T, 4)))
    with pytest.raises(DataError, match="changes nothing in its own outputs"):
        leaks.find_leaks(lambda *_: silent, {}, batch_of(CASES["masked"][1]), PackedDocuments(), REGULAR)


def test_kinds() -> None:
    assert leaks.packed(PackedPairs()) and leaks.packed(PackedDocuments()) and not leaks.packed(SentencePairs())
    assert leaks.crosses_documents(Windows()) and not leaks.crosses_documents(SentencePairs())
