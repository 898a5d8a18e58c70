"""Greedy continuations, filters and beams against `transformers.generate` at random weights and odd sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.generation.beam import search
from bertgpt_jax.generation.continuation import Continuation
from bertgpt_jax.generation.decode import GptDecoder
from bertgpt_jax.generation.sampling import Sampling, adjust
from bertgpt_jax.models.gpt import GptConfig

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install -e '.[parity]'")
pytestmark = pytest.mark.parity

L, D, HEADS, F, V, CONTEXT = 3, 48, 3, 80, 101, 77
PROMPTS = [[5, 17, 99], [3], [42, 7, 7, 60, 1, 88]]


@pytest.fixture(scope="module")
def models(parity):
    """(theirs, our decoder, our parameters in its layout)."""
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V, n_embd=D, n_layer=L, n_head=HEADS, n_inner=F, n_positions=CONTEXT, bos_token_id=None,
            eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    parity.randomize(theirs, seed=4)
    params = parity.gpt_params(parity.Names(dict(theirs.named_parameters())), L, HEADS)
    sizes = dict(num_layers=L, hidden_size=D, num_heads=HEADS, intermediate_size=F)
    decoder = GptDecoder(GptConfig(**sizes, vocab_size=V, max_positions=CONTEXT), V)
    return theirs, decoder, decoder.layout(jax.tree.map(jnp.asarray, params))


def theirs_of(model, prompts: list[list[int]], **settings) -> np.ndarray:
    """Their new tokens of left-padded prompts."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return model.generate(tokens, attention_mask=mask, do_sample=False, **settings)[:, width:].numpy()


def test_greedy_continuations_of_ragged_prompts(models) -> None:
    theirs, decoder, params = models
    expected = theirs_of(theirs, PROMPTS, max_new_tokens=50)
    ours = Continuation(decoder, params, Sampling(temperature=0), 50).run(PROMPTS)
    assert np.array_equal(ours, expected) and len(np.unique(expected)) > 5


def test_repetition_penalty(models) -> None:
    theirs, decoder, params = models
    prompt = [PROMPTS[2]]
    expected = theirs_of(theirs, prompt, max_new_tokens=30, repetition_penalty=1.5)
    ours = Continuation(decoder, params, Sampling(temperature=0, repetition_penalty=1.5), 30).run(prompt)
    assert np.array_equal(ours, expected)
    assert ours != Continuation(decoder, params, Sampling(temperature=0), 30).run(prompt)


@pytest.mark.parametrize("settings", [{"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.6}])
def test_filters(settings: dict) -> None:
    """The logits that are drawn from."""
    from transformers.generation import logits_process

    (name, value), *_ = settings.items()
    kind = {"top_k": "TopK", "top_p": "TopP", "min_p": "MinP", "temperature": "Temperature"}[name]
    warp = getattr(logits_process, f"{kind}LogitsWarper")(value)
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0)) * 2
    expected = warp(None, logits.clone()).numpy()
    np.testing.assert_allclose(adjust(jnp.asarray(logits.numpy()), Sampling(**settings)), expected, atol=1e-6)


def test_beams_without_a_length_penalty(models) -> None:
    """Log P alone: their penalty divides by a power of the length, ours is GNMT's."""
    theirs, decoder, params = models
    expected = theirs_of(theirs, PROMPTS, max_new_tokens=8, num_beams=4, length_penalty=0.0)
    ours = [found[0][0] for found in search(decoder, params, PROMPTS, 4, 8, alpha=0.0)]
    assert np.array_equal(ours, expected)
    greedy = Continuation(decoder, params, Sampling(temperature=0), 8).run(PROMPTS)
    assert ours != greedy, "beams find something else"
