"""A real GPT that sorts six letters (weights/gpt-nano-sort): through our modules and through the cache."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.generation.continuation import Continuation, right_aligned
from bertgpt_jax.generation.decode import GptDecoder
from bertgpt_jax.generation.sampling import Sampling
from bertgpt_jax.nn.attention import dot_product_attention
from bertgpt_jax.nn.blocks import Block, unstack
from bertgpt_jax.nn.layers import activation
from bertgpt_jax.nn.masks import causal_mask

NANO = "weights/gpt-nano-sort/gpt-nano-sort-{}.json.gz"


@pytest.fixture(scope="module")
def nano(shared_data):
    """(config, params)."""
    from bertgpt_jax.transfer.mingpt import open_mingpt
    from bertgpt_jax.transfer.source import nested

    source = open_mingpt(shared_data / NANO.format("model"))
    return source.model_config, nested(source.read(list(source.leaves)))


@pytest.fixture(scope="module")
def stored(shared_data) -> dict[str, np.ndarray]:
    """The 25 arrays, `idx` (the input) among them."""
    from bertgpt_jax.transfer.mingpt import read_tensors

    arrays = read_tensors(shared_data / NANO.format("t0-partials"))
    del arrays["config"]
    assert len(arrays) == 25
    return arrays


def captured(config, params, tokens) -> dict[str, jax.Array]:
    """What our modules compute, under the names of the stored arrays, captured from the modules themselves."""
    from bertgpt_jax.models import make_model
    from bertgpt_jax.nn.blocks import ComputeConfig

    model, tree = make_model(config, ComputeConfig()), {"params": params}
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    x, seen = model.apply(tree, tokens, positions, method="embed", capture_intermediates=True, mutable="intermediates")
    seen = seen["intermediates"]
    found = {
        "idx": tokens.astype(np.float32),
        "tok_emb": seen["token_embedding"]["__call__"][0],
        "pos_emb": seen["position_embedding"]["__call__"][0][:1],
        "x": x,
    }
    for number, layer in enumerate(unstack(params["layers"])):
        block = Block(config)
        (after, _), seen = block.apply(
            {"params": layer}, x, causal_mask(), capture_intermediates=True, mutable="intermediates"
        )
        if number == 0:
            found |= of_a_block(config, seen["intermediates"], x, after)
        x = found[f"block{number}"] = after
    found["ln_f"] = model.apply(tree, x, method="normalize")
    found["lm_head"] = model.apply(tree, found["ln_f"], method="logits")
    found["probs"] = jax.nn.softmax(found["lm_head"])
    return found


def of_a_block(config, seen, x, after) -> dict[str, jax.Array]:
    """The 17 arrays inside a block. Attention with the identity for values yields its own weights."""
    attention, inner = seen["attention"], seen["feed_forward"]
    q, k, v = (attention[name]["__call__"][0] for name in ("query", "key", "value"))
    rows, length = x.shape[:2]
    identity = jnp.broadcast_to(jnp.eye(length)[None, :, None], (rows, length, config.num_heads, length))
    mixed = dot_product_attention(q, k, v, causal_mask())
    raw = attention["output"]["__call__"][0]
    up = inner["up"]["__call__"][0]
    return {
        "ln1": seen["attention_norm"]["__call__"][0],
        "q": q.swapaxes(1, 2),
        "k": k.swapaxes(1, 2),
        "v": v.swapaxes(1, 2),
        "qkv": jnp.concatenate([y.reshape(rows, length, -1) for y in (q, k, v)], -1),
        "att": jnp.einsum("BTNH,BSNH->BNTS", q, k) * config.head_size**-0.5,
        "attSm": dot_product_attention(q, k, identity, causal_mask()).swapaxes(1, 2),
        "y": mixed.reshape(rows, length, -1),
        "yProj": raw,
        "attnResid": x + raw,
        "ln2": seen["feed_forward_norm"]["__call__"][0],
        "fc": up,
        "gelu": activation(config.activation)(up),
        "mlp": inner["down"]["__call__"][0],
        "mlpResid": after,
    }


def test_every_stored_activation_to_1e_5(nano, stored) -> None:
    found = captured(*nano, stored["idx"].astype(np.int32))
    assert set(found) == set(stored)
    for name, expected in stored.items():
        ours, allowed = np.asarray(found[name]), np.isfinite(expected)  # -inf where a position may not be seen
        assert ours.shape == expected.shape and allowed.any(), name
        assert np.abs(ours[allowed] - expected[allowed]).max() <= 1e-5, name


def test_the_cache_holds_the_stored_keys_and_values(nano, stored) -> None:
    config, params = nano
    decoder = GptDecoder(config, config.vocab_size)
    tokens_BT, starts_B = right_aligned(stored["idx"].astype(np.int32))
    logits, cache = decoder.prefill(decoder.layout(params), tokens_BT, starts_B, tokens_BT.shape[1])
    begin = int(starts_B[0])
    for name, ours in zip("kv", cache.layers[0], strict=True):
        assert np.abs(np.asarray(ours)[:, :, begin:] - stored[name]).max() <= 1e-5
    assert np.abs(logits - stored["lm_head"][:, -1]).max() <= 1e-5


def test_it_sorts_all_729_inputs(nano) -> None:
    """Greedily, through the cache: six letters fill the context of 11 with five of the six answers."""
    config, params = nano
    decoder = GptDecoder(config, config.vocab_size)
    inputs = np.array(list(itertools.product(range(3), repeat=6)))
    found = Continuation(decoder, decoder.layout(params), Sampling(temperature=0), 6).run(inputs)
    assert np.array_equal(found, np.sort(inputs, 1))
