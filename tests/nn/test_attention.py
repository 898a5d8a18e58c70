"""The reference attention against NumPy in float64, and its dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.nn.attention import dot_product_attention
from bertgpt_jax.nn.masks import AttentionMask, causal_mask, segment_mask

B, T, N, H = 2, 6, 3, 4
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
MASKS = {
    "none": AttentionMask(),
    "causal": causal_mask(),
    "segments": segment_mask(SEGMENTS),
    "causal window": AttentionMask(causal=True, window=3),
    "prefix": AttentionMask(causal=True, prefix_B=np.array([2, 4])),
    "explicit": AttentionMask(allowed_BNTS=np.random.default_rng(5).random((B, N, T, T)) < 0.6),
}


def inputs(seed: int = 0, scale: float = 1.0, kv_length: int = T) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((B, n, N, H)) * scale).astype(np.float32) for n in (T, kv_length, kv_length)]


def attention64(q, k, v, allowed) -> np.ndarray:
    """Loops over rows, heads and queries; no shared code and no batching."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        keys = [s for s in range(k.shape[1]) if allowed is None or allowed[b, n, t, s]]
        if not keys:
            continue
        scores = np.array([q[b, t, n].astype(np.float64) @ k[b, s, n] for s in keys]) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, t, n] = sum(w * v[b, s, n].astype(np.float64) for w, s in zip(weights, keys, strict=True))
    return out


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_equals_float64(name: str, scale: float) -> None:
    q, k, v = inputs(scale=scale)
    allowed = MASKS[name].to_array(T, T)
    expected = attention64(q, k, v, None if allowed is None else np.broadcast_to(allowed, (B, N, T, T)))
    out = dot_product_attention(q, k, v, MASKS[name])
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6 * scale)


def test_other_key_length() -> None:
    q, k, v = inputs(kv_length=9)
    np.testing.assert_allclose(dot_product_attention(q, k, v, AttentionMask()), attention64(q, k, v, None), atol=2e-6)


def test_bfloat16_keeps_its_dtype_and_softmax_precision() -> None:
    """512 keys of equal score: a softmax in bf16 would sum to something like 256."""
    q, k = jnp.zeros((1, 2, 1, 8), jnp.bfloat16), jnp.zeros((1, 512, 1, 8), jnp.bfloat16)
    out = dot_product_attention(q, k, jnp.ones((1, 512, 1, 8), jnp.bfloat16), AttentionMask())
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=0.01)
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(1))
    out = dot_product_attention(q, k, v, causal_mask())
    expected = attention64(*(np.asarray(x, np.float64) for x in (q, k, v)), np.broadcast_to(np.tri(T), (B, N, T, T)))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)


def test_a_query_without_keys_yields_zeros_and_finite_gradients() -> None:
    allowed = np.ones((1, 1, T, T), bool)
    allowed[..., 2, :] = False
    q, k, v = inputs()
    out, pull = jax.vjp(lambda *x: dot_product_attention(*x, AttentionMask(allowed_BNTS=allowed)), q, k, v)
    assert not np.any(out[:, 2]) and np.all(np.any(out[:, :2], -1))
    grads = pull(jnp.ones_like(out))
    assert all(np.all(np.isfinite(g)) for g in grads)
    assert not np.any(grads[0][:, 2])


OTHERS = np.array([[1, 1, 3, 3, 3, 3], [1, 2, 1, 2, 2, 2]])
BLIND = {
    "other segments": AttentionMask(q_segments_BT=SEGMENTS, kv_segments_BS=OTHERS),
    "causal, other segments": AttentionMask(causal=True, q_segments_BT=SEGMENTS[:, ::-1], kv_segments_BS=OTHERS),
    "keys that come later": AttentionMask(causal=True, kv_positions_BS=np.arange(T)[None] + 2),
    "keys out of the window": AttentionMask(window=2, q_positions_BT=np.array([[0, 1, 2, 9, 10, 11]])),
    "keys of another row": AttentionMask(
        q_segments_BT=np.ones((B, T), int), kv_segments_BS=np.array([[1] * T, [2] * T])
    ),
}


@pytest.mark.parametrize("name", BLIND)
def test_queries_that_any_part_of_the_mask_leaves_nothing(name: str) -> None:
    """Zeros, no share in any gradient, and the others as they are."""
    mask, (q, k, v) = BLIND[name], inputs()
    allowed = np.broadcast_to(mask.to_array(T, T), (B, N, T, T))
    blind = ~allowed.any(-1).swapaxes(1, 2)
    assert blind.any() and not blind.all() and mask.may_blind(T, T)
    out, pull = jax.vjp(lambda *x: dot_product_attention(*x, mask), q, k, v)
    np.testing.assert_allclose(out, attention64(q, k, v, allowed), rtol=2e-5, atol=2e-6)
    assert not np.any(np.asarray(out)[blind])
    grads = pull(jnp.broadcast_to(jnp.where(blind[..., None], 1e3, 0.0), out.shape))
    assert not any(np.any(g) for g in grads)


def test_more_queries_than_a_window_reaches() -> None:
    q, k, v = (x[:, :length] for x, length in zip(inputs(), (T, 2, 2), strict=True))
    mask = AttentionMask(window=2)
    assert mask.may_blind(T, 2) and not mask.may_blind(3, 2)
    out = np.asarray(dot_product_attention(q, k, v, mask))
    assert not out[:, 3:].any() and out[:, :3].any(-1).all()


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(),
        AttentionMask(causal=True, window=2),
        causal_mask(),
        causal_mask(SEGMENTS),
        segment_mask(SEGMENTS),
        segment_mask(SEGMENTS, packed=False),
    ],
)
def test_masks_that_leave_every_query_a_key_cost_nothing(mask: AttentionMask) -> None:
    """Among the traced operations is no reduction of the mask."""
    assert np.asarray(mask.to_array(T, T) if mask.to_array(T, T) is not None else True).any(-1).all()
    assert "reduce_or" not in str(jax.make_jaxpr(lambda *x: dot_product_attention(*x, mask))(*inputs()))
    blind = BLIND["other segments"]
    assert "reduce_or" in str(jax.make_jaxpr(lambda *x: dot_product_attention(*x, blind))(*inputs()))


def test_gradient_of_forbidden_keys_is_zero() -> None:
    q, k, v = inputs()
    _, pull = jax.vjp(lambda *x: dot_product_attention(*x, segment_mask(SEGMENTS)), q, k, v)
    cotangent = np.zeros((B, T, N, H), np.float32)
    cotangent[0, :3] = 1.0
    _, dk, dv = pull(cotangent)
    assert not np.any(dk[0, 3:]) and not np.any(dv[0, 3:]) and not np.any(dk[1])
    assert np.all(np.any(dv[0, :3], -1))


def test_dropout_drops_probabilities_and_scales_the_rest() -> None:
    """With unit vectors as values the output is the matrix of attention probabilities itself."""
    rng, length, rate = np.random.default_rng(0), 32, 0.25
    q, k = (rng.standard_normal((4, length, 2, length)).astype(np.float32) for _ in range(2))
    v = np.broadcast_to(np.eye(length, dtype=np.float32)[None, :, None], (4, length, 2, length))
    full = dot_product_attention(q, k, v, AttentionMask(), rate, None)
    np.testing.assert_allclose(np.sum(full, -1), 1.0, rtol=1e-5)
    dropped = np.asarray(dot_product_attention(q, k, v, AttentionMask(), rate, jax.random.key(1)))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], np.asarray(full)[kept] / (1 - rate), rtol=1e-5)
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / kept.size)
    again = dot_product_attention(q, k, v, AttentionMask(), rate, jax.random.key(1))
    other = dot_product_attention(q, k, v, AttentionMask(), rate, jax.random.key(2))
    assert np.array_equal(dropped, again) and not np.array_equal(dropped, other)
