"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1), one signature for every path."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bertgpt_jax.nn.layers import constrain, dropout
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.shapes import Array, Heads

MASKED = -1e30
"""Logit of a forbidden pair: exp() of it is 0 in fp32 next to any real logit, without the NaN that -inf can give."""


def dot_product_attention(
    q_BTNH: Heads,
    k_BSNH: Heads,
    v_BSNH: Heads,
    mask: AttentionMask,
    dropout_rate: float = 0.0,
    key: Array | None = None,
) -> Heads:
    """softmax(q k^T / sqrt(H)) v under `mask`, softmax in fp32, result in q's dtype; the reference path.

    A query that an explicit mask leaves nothing to attend to yields zeros.

    Args:
        dropout_rate: of the attention probabilities; applied when `key` is given.
    """
    # [B, N] leading: both products are then plain batched matrix products, on every platform the fastest layout.
    q_BNTH, k_BNSH, v_BNSH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSNH, v_BSNH))
    scores_BNTS = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH * q_BTNH.shape[-1] ** -0.5, k_BNSH)
    scores_BNTS = scores_BNTS.astype(jnp.float32)
    allowed = mask.to_array(q_BTNH.shape[1], k_BSNH.shape[1])
    if allowed is not None:
        scores_BNTS = jnp.where(allowed, scores_BNTS, MASKED)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
    if mask.allowed_BNTS is not None:
        weights_BNTS = jnp.where(allowed, weights_BNTS, 0.0)
    weights_BNTS = dropout(weights_BNTS.astype(q_BTNH.dtype), dropout_rate, key)
    return jnp.einsum("BNTS,BNSH->BNTH", weights_BNTS, v_BNSH).swapaxes(1, 2)


class KeyValues(NamedTuple):
    """What one layer remembers of the tokens it has seen, S slots a row; each head's slots lie together.

    Heads come before slots because a decoding step reads all of a head's keys: the other order copies the whole cache
    in every step.
    """

    k_BNSH: Array
    v_BNSH: Array

    def extended(self, k_BTNH: Heads, v_BTNH: Heads, slot: Array | None) -> KeyValues:
        """With T more tokens: written at slots `slot`.. (int32 []), or as new slots behind the others (None)."""

        def extend(old_BNSH: Array, new_BTNH: Heads) -> Array:
            new_BNTH = new_BTNH.swapaxes(1, 2).astype(old_BNSH.dtype)
            if slot is None:
                old_BNSH = jnp.concatenate([old_BNSH, new_BNTH], 2)
            else:
                old_BNSH = jax.lax.dynamic_update_slice_in_dim(old_BNSH, new_BNTH, slot, 2)
            return constrain(old_BNSH, "batch", "act_heads", None, None)

        return KeyValues(extend(self.k_BNSH, k_BTNH), extend(self.v_BNSH, v_BTNH))
