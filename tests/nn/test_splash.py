"""The splash kernel, emulated, equals the reference path: values and gradients, every mask it serves."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.nn.attention import dot_product_attention
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.nn.splash import obstacles, splash_attention

LENGTH = 256


def _inputs(heads: int = 1, width: int = 64, rows: int = 2, dtype: str = "float32") -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((rows, LENGTH, heads, width)), dtype) for _ in range(4))


def _segments(rows: int = 2) -> jax.Array:
    """Several segments a row, of uneven length, and padding (0) at the end; one row is nothing but padding."""
    ids = np.zeros((rows, LENGTH), np.int32)
    ids[0, :100], ids[0, 100:130], ids[0, 130:250] = 1, 2, 3
    return jnp.asarray(ids)


def _masks() -> dict[str, AttentionMask]:
    ids = _segments()
    return {
        "full": AttentionMask(),
        "causal": AttentionMask(causal=True),
        "window": AttentionMask(window=40),
        "causal window": AttentionMask(causal=True, window=40),
        "segments": AttentionMask(q_segments_BT=ids, kv_segments_BS=ids),
        "causal segments": AttentionMask(causal=True, q_segments_BT=ids, kv_segments_BS=ids),
        "queries without a key": AttentionMask(q_segments_BT=ids, kv_segments_BS=jnp.where(ids == 2, 4, ids)),
        "causal, queries without a key": AttentionMask(
            causal=True, q_segments_BT=ids, kv_segments_BS=jnp.roll(ids, 150, 1)
        ),
    }


def _both(attention, mask: AttentionMask, q, k, v, g) -> tuple[jax.Array, ...]:
    """(output, gradients) of sum(output * g)."""

    def loss(q, k, v):
        out = attention(q, k, v, mask)
        return jnp.sum(out.astype(jnp.float32) * g), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


def _emulated(*qkv_mask) -> jax.Array:
    return splash_attention(*qkv_mask, interpret=True)


@pytest.mark.parametrize("name", list(_masks()))
def test_equals_the_reference(name: str) -> None:
    qkvg, mask = _inputs(), _masks()[name]
    assert obstacles(qkvg[0].shape, LENGTH, jnp.float32, mask, dropping=False) == []
    want, got = _both(dot_product_attention, mask, *qkvg), _both(_emulated, mask, *qkvg)
    allowed = np.asarray(True if mask.to_array(LENGTH, LENGTH) is None else mask.to_array(LENGTH, LENGTH))
    blind = ~np.broadcast_to(allowed, (2, 1, LENGTH, LENGTH)).any(-1)[:, 0]
    assert blind.any() == ("without a key" in name)
    assert not np.asarray(got[0])[blind].any() and not np.asarray(got[1])[blind].any()
    for ours, reference, tolerance in zip(got, want, (2e-6, 2e-5, 2e-5, 2e-5), strict=True):
        np.testing.assert_allclose(ours, reference, atol=tolerance)


@pytest.mark.parametrize(("width", "dtype", "tolerance"), [(128, "float32", 2e-6), (64, "bfloat16", 0.02)])
def test_wider_heads_and_bfloat16(width: int, dtype: str, tolerance: float) -> None:
    """bf16: against the reference in fp32 of the same numbers, within a few roundings of the largest."""
    *qkv, g = _inputs(width=width, dtype=dtype)
    mask, wide = _masks()["causal segments"], [x.astype(jnp.float32) for x in (*qkv, g)]
    assert obstacles(qkv[0].shape, LENGTH, jnp.dtype(dtype), mask, dropping=False) == []
    want, got = _both(dot_product_attention, mask, *wide), _both(_emulated, mask, *qkv, wide[3])
    for ours, reference in zip(got, want, strict=True):
        assert ours.dtype == dtype
        atol = tolerance * max(1.0, np.abs(reference).max())
        np.testing.assert_allclose(ours.astype(jnp.float32), reference, atol=10 * atol if dtype == "float32" else atol)


def test_on_a_mesh_each_device_computes_its_rows_and_heads() -> None:
    q, k, v, _ = _inputs(heads=4, rows=4)
    ids = jnp.tile(_segments(), (2, 1))
    mask = AttentionMask(q_segments_BT=ids, kv_segments_BS=ids)
    mesh = jax.make_mesh((4, 2), ("rows", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", "rows"), ("act_heads", "heads"))):
        compiled = jax.jit(lambda *a: splash_attention(*a, mask, interpret=True))(q, k, v)
    assert compiled.sharding.shard_shape(compiled.shape) == (1, LENGTH, 2, 64)
    np.testing.assert_allclose(compiled, dot_product_attention(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize(
    ("shape", "kv_length", "mask", "dropout", "word"),
    [
        ((1, 100, 2, 64), 128, AttentionMask(), False, "multiples of 128"),
        ((1, 128, 2, 48), 128, AttentionMask(), False, "head width 48"),
        ((1, 128, 2, 64), 128, AttentionMask(), True, "dropout"),
        ((1, 128, 2, 64), 128, AttentionMask(allowed_BNTS=jnp.ones((1, 1, 1, 1), bool)), False, "explicit"),
        ((1, 128, 2, 64), 128, AttentionMask(q_positions_BT=jnp.ones((1, 128), int)), False, "positions"),
        ((1, 128, 2, 64), 256, AttentionMask(causal=True), False, "128 queries to 256 keys"),
    ],
)
def test_what_it_cannot_serve(shape: tuple, kv_length: int, mask: AttentionMask, dropout: bool, word: str) -> None:
    found = obstacles(shape, kv_length, jnp.float32, mask, dropout)
    assert len(found) == 1 and word in found[0]
