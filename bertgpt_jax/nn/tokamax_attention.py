"""Attention by tokamax (github.com/openxla/tokamax), an extra: its Pallas kernels where there are some, else XLA.

It is under development and says so; `auto` never takes it, a config has to ask for it by name.
"""

from __future__ import annotations

import importlib.util

import jax.numpy as jnp

from bertgpt_jax.nn.by_device import on_each_device
from bertgpt_jax.nn.masks import AttentionMask, untellable
from bertgpt_jax.shapes import Array, Heads


def obstacles(
    q_shape: tuple[int, ...], kv_length: int, dtype: jnp.dtype, mask: AttentionMask, dropping: bool, shards: int = 1
) -> list[str]:
    """Why it cannot serve these shapes and this mask; empty if it can.

    Args:
        q_shape: (B, T, N, H).
        dropping: attention probabilities are dropped.
        shards: parts into which the mesh splits the queries.
    """
    found = []
    if importlib.util.find_spec("tokamax") is None:
        found.append("it is not installed: pip install 'bertgpt_jax[tokamax]' (Python 3.12 or later)")
    if shards > 1:
        found.append(f"the mesh splits the sequence into {shards}")
    if dropping:
        found.append("it has no dropout of attention probabilities (set model.attention_dropout=0)")
    if mask.window is not None:
        found.append("the mask has a window")
    if mask.q_segments_BT is not None and mask.lengths_B is None:
        found.append("rows hold several segments")
    return found + untellable(mask, q_shape[1], kv_length)


def tokamax_attention(q_BTNH: Heads, k_BSNH: Heads, v_BSNH: Heads, mask: AttentionMask) -> Heads:
    """softmax(q k^T / sqrt(H)) v under `mask`, result in q's dtype; call it where `obstacles` finds none.

    Rows of `mask.lengths_B` real tokens: what queries beyond them yield is finite and means nothing.
    """
    import tokamax

    def attend(q_BTNH: Heads, k_BSNH: Heads, v_BSNH: Heads, lengths_B: Array | None) -> Heads:
        # a row of padding alone sees its first token, as softmax over nothing would be NaN
        lengths_B = None if lengths_B is None else jnp.maximum(lengths_B, 1)
        out_BTNH = tokamax.dot_product_attention(
            q_BTNH, k_BSNH, v_BSNH, is_causal=mask.causal, key_value_seq_lengths=lengths_B
        )
        return out_BTNH.astype(q_BTNH.dtype)

    return on_each_device(attend, (q_BTNH, k_BSNH, v_BSNH), mask.lengths_B)
