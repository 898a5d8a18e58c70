"""BERT and GPT-2 against Hugging Face transformers at random weights and odd sizes: logits, losses, every gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.models.bert import Bert, BertConfig
from bertgpt_jax.models.gpt import Gpt, GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.base import total_loss
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install -e '.[parity]'")
pytestmark = pytest.mark.parity

L, D, HEADS, F, V, T = 3, 48, 3, 80, 101, 13
LENGTHS = np.array([13, 7, 10, 2])  # real tokens of each row
SIZES = dict(vocab_size=V, num_layers=L, hidden_size=D, num_heads=HEADS, intermediate_size=F)
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
IGNORED = -100  # transformers' label of what is not scored
COMPUTE = ComputeConfig(unroll_layers=False)


def evaluate(model, objective, params, batch):
    """(model outputs, loss parts, total loss, gradients), dropout off."""

    def loss(params):
        sums = objective.loss(model, params, batch, (), None)
        return total_loss(objective, sums.parts, objective.weights(batch)), sums.parts

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params):
        outputs = model.apply({"params": params}, *objective.model_inputs(batch))
        return outputs, jax.value_and_grad(loss, has_aux=True)(params)

    outputs, ((total, parts), grads) = run(jax.tree.map(jnp.asarray, params))
    weights = objective.weights(batch)
    return outputs, {name: float(parts[name] / weights[name]) for name in parts}, float(total), grads


def assert_near(ours, theirs, what: str) -> None:
    difference = np.abs(np.asarray(ours) - theirs.detach().numpy()).max()
    print(f"{what}: {difference:.1e}")
    assert difference <= 1e-5, what


@pytest.fixture(scope="module")
def bert_batch() -> dict[str, np.ndarray]:
    """Padded rows with two types; up to 3 masked positions a row, of which some rows use fewer."""
    rng = np.random.default_rng(0)
    real = np.arange(T)[None] < LENGTHS[:, None]
    return {
        "tokens": np.where(real, rng.integers(1, V, (4, T)), 0),
        "positions": np.broadcast_to(np.arange(T), (4, T)),
        "segments": real.astype(np.int32),
        "types": (real & (np.arange(T) >= LENGTHS[:, None] // 2)).astype(np.int32),
        "mask_positions": np.array([[1, 5, 12], [2, 6, 0], [3, 9, 0], [1, 0, 0]]),
        "mask_labels": rng.integers(1, V, (4, 3)),
        "mask_weights": np.array([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0]], np.float32),
        "next_labels": np.array([0, 1, 1, 0]),
        "next_weights": np.ones(4, np.float32),
    }


def bert_labels(batch: dict) -> np.ndarray:
    labels = np.full((4, T), IGNORED)
    for row, (places, words, weights) in enumerate(
        zip(batch["mask_positions"], batch["mask_labels"], batch["mask_weights"], strict=True)
    ):
        for place, word, weight in zip(places, words, weights, strict=True):
            if weight:
                labels[row, place] = word
    return labels


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bert_for_pretraining(parity, bert_batch, activation: str) -> None:
    theirs = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=V,
            hidden_size=D,
            num_hidden_layers=L,
            num_attention_heads=HEADS,
            intermediate_size=F,
            max_position_embeddings=T + 3,
            hidden_act=ACTIVATIONS[activation],
            attn_implementation="eager",
        )  # fmt: skip
    ).eval()
    parity.randomize(theirs, seed=0)
    names = parity.Names(dict(theirs.named_parameters()))
    params = parity.bert_params(names, L, HEADS)
    assert not names.unread, "every weight of theirs has its place in ours"
    model = Bert(BertConfig(**SIZES, max_positions=T + 3, activation=activation), COMPUTE)
    (logits, next_logits), parts, total, grads = evaluate(model, MaskedLMNSP(), params, bert_batch)

    as_torch = {name: torch.tensor(np.array(array)) for name, array in bert_batch.items()}
    out = theirs(
        input_ids=as_torch["tokens"].long(),
        attention_mask=as_torch["segments"].long(),
        token_type_ids=as_torch["types"].long(),
        labels=torch.tensor(bert_labels(bert_batch)),
        next_sentence_label=as_torch["next_labels"].long(),
    )
    asked = out.prediction_logits[torch.arange(4)[:, None], as_torch["mask_positions"].long()]
    assert_near(logits, asked, "masked logits")
    assert_near(next_logits, out.seq_relationship_logits, "next-sentence logits")
    assert_near(total, out.loss, "loss")
    assert parts["mlm"] + parts["nsp"] == pytest.approx(total, abs=1e-6)
    out.loss.backward()
    their_grads = parity.bert_params(parity.Names({n: p.grad for n, p in theirs.named_parameters()}), L, HEADS)
    print(f"gradients: {parity.assert_gradients(grads, their_grads):.1e} of the bound")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gpt2_lm_head_model(parity, activation: str) -> None:
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V,
            n_embd=D,
            n_layer=L,
            n_head=HEADS,
            n_inner=F,
            n_positions=T + 3,
            bos_token_id=0,
            eos_token_id=0,
            activation_function=ACTIVATIONS[activation],
            attn_implementation="eager",
        )  # fmt: skip
    ).eval()
    parity.randomize(theirs, seed=1)
    names = parity.Names(dict(theirs.named_parameters()))
    params = parity.gpt_params(names, L, HEADS)
    assert not names.unread
    stream = np.random.default_rng(1).integers(0, V, (4, T + 1))
    scored = np.arange(T)[None] < LENGTHS[:, None]  # short rows: what follows is padding and not scored
    batch = {
        "tokens": stream[:, :-1],
        "positions": np.broadcast_to(np.arange(T), (4, T)),
        "targets": stream[:, 1:],
        "weights": scored.astype(np.float32),
    }
    model = Gpt(GptConfig(**SIZES, max_positions=T + 3, activation=activation), COMPUTE)
    logits, _, total, grads = evaluate(model, CausalLM(), params, batch)

    out = theirs(input_ids=torch.tensor(batch["tokens"]), attention_mask=torch.tensor(scored).long())
    targets = torch.tensor(np.where(scored, batch["targets"], IGNORED))
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    assert_near(np.where(scored[..., None], logits, 0), out.logits * torch.tensor(scored)[..., None], "logits")
    assert_near(total, loss, "loss")
    loss.backward()
    their_grads = parity.gpt_params(parity.Names({n: p.grad for n, p in theirs.named_parameters()}), L, HEADS)
    print(f"gradients: {parity.assert_gradients(grads, their_grads):.1e} of the bound")
