"""Decoding with a cache against the full forward, at every position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.generation.continuation import right_aligned
from bertgpt_jax.generation.decode import GptDecoder
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.parallel.sharding import batch_sharding, mesh_context

LENGTHS, STEPS = (5, 1, 7, 3), 6
RNG = np.random.default_rng(1)
TEXTS = [RNG.integers(0, 19, n + STEPS).tolist() for n in LENGTHS]


prefill = jax.jit(GptDecoder.prefill, static_argnums=(0, 4))
step = jax.jit(GptDecoder.step, static_argnums=0)


def decoded(decoder: GptDecoder, params, texts, place=jnp.asarray) -> np.ndarray:
    """Logits [B, 1 + STEPS, V] of the tokens after each prompt, the texts' own tokens read one by one."""
    prompts = [text[: len(text) - STEPS] for text in texts]
    tokens_BT, starts_B = right_aligned(prompts)
    logits, cache = prefill(decoder, params, place(tokens_BT), place(starts_B), tokens_BT.shape[1] + STEPS)
    found = [logits]
    for i in range(STEPS):
        token = np.array([text[len(prompt) + i] for text, prompt in zip(texts, prompts, strict=True)], np.int32)
        logits, cache = step(decoder, params, place(token), cache)
        found.append(logits)
    return np.stack([np.asarray(x) for x in found], 1)


@pytest.mark.parametrize(("name", "transposed"), [("gpt", False), ("gpt", True), ("gpt1", False)])
def test_cached_equals_full(request, name: str, transposed: bool) -> None:
    """Every position of ragged prompts, pre- and post-norm, tied and untied."""
    tiny = request.getfixturevalue(name)
    decoder = GptDecoder(tiny.config, 19, transposed_head=transposed)
    found = decoded(decoder, decoder.layout(tiny.params), TEXTS)
    for text, length, logits in zip(TEXTS, LENGTHS, found, strict=True):
        full = tiny.forward([text])[0, length - 1 :]
        assert np.abs(full).max() > 0.5, "logits that could be told apart"
        np.testing.assert_allclose(logits, full, atol=1e-5)


def test_a_row_alone(gpt) -> None:
    """One row has a layout of its own."""
    decoder = GptDecoder(gpt.config, 19)
    found = decoded(decoder, decoder.layout(gpt.params), TEXTS[:1])
    np.testing.assert_allclose(found[0], gpt.forward([TEXTS[0]])[0, LENGTHS[0] - 1 :], atol=1e-5)


def test_padding_is_never_read(gpt) -> None:
    """What stands before a prompt changes no bit of its logits."""
    decoder = GptDecoder(gpt.config, 19)
    params = decoder.layout(gpt.params)
    tokens_BT, starts_B = right_aligned([[3, 1, 4], [1, 5]])
    other_BT = np.where(np.arange(tokens_BT.shape[1]) < starts_B[:, None], 7, tokens_BT)
    one, other = (prefill(decoder, params, x, starts_B, 64)[0] for x in (tokens_BT, other_BT))
    np.testing.assert_array_equal(one, other)


def test_rows_that_pad_the_table_are_no_tokens(gpt) -> None:
    decoder = GptDecoder(gpt.config, 11)
    params, prompt = decoder.layout(gpt.params), right_aligned([[1, 2]])
    assert jax.eval_shape(lambda: decoder.prefill(params, *prompt, 64))[0].shape == (1, 11)


def test_bfloat16_layout(gpt) -> None:
    """Matrices, cache and activations in bf16, vectors and logits in fp32."""
    decoder = GptDecoder(gpt.config, 19, dtype="bfloat16")
    params = decoder.layout(gpt.params)
    assert {x.dtype.name for x in jax.tree.leaves(params) if x.ndim > 1} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(params["layers"][0]["attention_norm"])} == {"float32"}
    logits, cache = prefill(decoder, params, *right_aligned([TEXTS[0]]), 64)
    assert logits.dtype == jnp.float32 and cache.layers[0].k_BNSH.dtype == jnp.bfloat16
    full = gpt.forward([TEXTS[0]])[0, -1]
    assert np.abs(logits[0] - full).max() < 0.05 * np.abs(full).max()


def test_on_a_mesh(tiny) -> None:
    """Sharded as in training: the same logits; weights and cache are split by heads, rows over the rest."""
    sizes = dict(num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32, vocab_size=16, max_positions=24)
    model = tiny(GptConfig(**sizes))
    decoder, texts = GptDecoder(model.config, 16), [[token % 16 for token in text] for text in TEXTS]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = decoder.layout(model.params, mesh)
    query = params["layers"][1]["attention"]["query"]["kernel"]
    assert query.sharding.shard_shape(query.shape) == (8, 1, 8), "width over fsdp, heads over tensor"
    with mesh_context(mesh):
        sharded = decoded(decoder, params, texts, lambda x: jax.device_put(x, batch_sharding(mesh)))
    np.testing.assert_allclose(sharded, decoded(decoder, decoder.layout(model.params), texts), atol=1e-5)
