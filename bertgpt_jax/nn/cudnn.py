"""Attention by cuDNN's fused kernels on NVIDIA GPUs, through `jax.nn.dot_product_attention` (implementation="cudnn").

It must be asked for by name: without one jax always takes XLA. Padding is told as lengths, since a boolean mask makes
cuDNN read a [T, S] bias; segments of packed rows go through `nn.cudnn_packed`. Dropout, which is not public in jax, is
left to the reference path.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bertgpt_jax.nn import cudnn_packed
from bertgpt_jax.nn.masks import AttentionMask, untellable
from bertgpt_jax.shapes import Heads


def obstacles(
    q_shape: tuple[int, ...], kv_length: int, dtype: jnp.dtype, mask: AttentionMask, dropping: bool, shards: int = 1
) -> list[str]:
    """Why the kernels cannot serve these shapes and this mask; empty if they can.

    Args:
        q_shape: (B, T, N, H).
        dropping: attention probabilities are dropped.
        shards: parts into which the mesh splits the queries.
    """
    head_size = q_shape[3]
    found = []
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        found.append(
            f"dtype {jnp.dtype(dtype).name} is none of bfloat16, float16 (set execution.compute.dtype=bfloat16)"
        )
    if head_size % 8 or head_size > 128:
        found.append(f"head width {head_size} is no multiple of 8 up to 128")
    if q_shape[1] % 2 or kv_length % 2:
        found.append(f"lengths {q_shape[1]} and {kv_length} are not even")
    if shards > 1:
        found.append(f"the mesh splits the sequence into {shards}, and jax has no public way to tell cuDNN")
    if dropping:
        found.append("jax has no public dropout of attention probabilities there (set model.attention_dropout=0)")
    if _packed(mask):
        found += cudnn_packed.obstacles(q_shape, kv_length, mask)
    if mask.window is not None and not mask.causal:
        found.append("the window looks both ways")
    return found + untellable(mask, q_shape[1], kv_length)


def cudnn_attention(q_BTNH: Heads, k_BSNH: Heads, v_BSNH: Heads, mask: AttentionMask) -> Heads:
    """softmax(q k^T / sqrt(H)) v under `mask`, result in q's dtype; call it where `obstacles` finds none.

    Rows of `mask.lengths_B` real tokens: queries beyond them yield zeros.
    """
    if _packed(mask):
        return cudnn_packed.packed_attention(q_BTNH, k_BSNH, v_BSNH, mask)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSNH,
        v_BSNH,
        is_causal=mask.causal,
        query_seq_lengths=mask.lengths_B,
        key_value_seq_lengths=mask.lengths_B,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )


def _packed(mask: AttentionMask) -> bool:
    return mask.q_segments_BT is not None and mask.lengths_B is None
