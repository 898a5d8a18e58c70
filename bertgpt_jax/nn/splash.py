"""Attention by the Pallas splash kernel on TPUs: no [T, S] array in memory, masked blocks are not computed.

Kernel: jax.experimental.pallas.ops.tpu.splash_attention (public in jax 0.10 to 0.12). It computes scores and softmax in
fp32 and takes the static part of a mask (causal, window) apart from segment ids.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.shapes import Array, Heads

LANES = 128
"""Sequence lengths are a multiple of this; the kernel's smallest block."""

BLOCK = 512
"""Largest block of queries and of keys: 512 x 512 fp32 scores are 1 MiB of a core's vector memory."""

HEAD_SIZES = (64, 128, 256)
"""Head widths that compile; at 64 half of every vector register is empty."""


def obstacles(
    q_shape: tuple[int, ...], kv_length: int, dtype: jnp.dtype, mask: AttentionMask, dropping: bool
) -> list[str]:
    """Why the kernel cannot serve these shapes and this mask; empty if it can.

    Args:
        q_shape: (B, T, N, H).
        dtype: of queries, keys and values; fp32 and bf16 both serve.
        dropping: attention probabilities are dropped.
    """
    _, length, _, head_size = q_shape
    found = []
    if length % LANES or kv_length % LANES:
        found.append(f"lengths {length} and {kv_length} are not multiples of {LANES}")
    if head_size not in HEAD_SIZES:
        found.append(f"head width {head_size} is none of {HEAD_SIZES}")
    if dropping:
        found.append("it has no dropout of attention probabilities (set model.attention_dropout=0)")
    if mask.allowed_BNTS is not None or mask.prefix_B is not None:
        found.append("the mask is an explicit array or has a prefix")
    if mask.q_positions_BT is not None or mask.kv_positions_BS is not None:
        found.append("the mask compares given positions, not places in the row")
    if mask.causal and length != kv_length:
        found.append(f"causal attention of {length} queries to {kv_length} keys")
    return found


def splash_attention(
    q_BTNH: Heads, k_BSNH: Heads, v_BSNH: Heads, mask: AttentionMask, interpret: bool = False
) -> Heads:
    """softmax(q k^T / sqrt(H)) v under `mask`, result in q's dtype; call it where `obstacles` finds none.

    Runs on each device's rows and heads alone (`jax.shard_map` over the mesh in force, split as the logical axes of
    activations say); the sequence is whole on every device.

    Args:
        interpret: emulates the kernel on any platform, slowly.
    """
    kernel = partial(_local_attention, causal=mask.causal, window=mask.window, interpret=interpret)
    segments = [mask.q_segments_BT, mask.kv_segments_BS]
    if segments[0] is None:  # the kernel is mapped over rows, so every row brings its own
        segments = None
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q_BTNH, k_BSNH, v_BSNH, segments)
    heads = nn.logical_to_mesh_axes(("batch", None, "act_heads", None))
    rows = nn.logical_to_mesh_axes(("batch", None))
    mapped = jax.shard_map(
        kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )  # the kernel's outputs carry no record of which mesh axes they vary over
    return mapped(q_BTNH, k_BSNH, v_BSNH, segments)


def _local_attention(
    q_BTNH: Heads,
    k_BSNH: Heads,
    v_BSNH: Heads,
    segments: list[Array] | None,
    causal: bool,
    window: int | None,
    interpret: bool,
) -> Heads:
    _, length, heads, head_size = q_BTNH.shape
    shape = (length, k_BSNH.shape[1])
    if window is not None:
        static = splash.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    else:
        static = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([static] * heads), block_sizes=_blocks(*shape), interpret=interpret
    )
    q_BNTH, k_BNSH, v_BNSH = (x.swapaxes(1, 2) for x in (q_BTNH * head_size**-0.5, k_BSNH, v_BSNH))
    if segments is None:
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BNSH, v_BNSH)
    else:
        ids = splash.SegmentIds(*(s.astype(jnp.int32) for s in segments))
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BNSH, v_BNSH, ids)
    return out_BNTH.astype(q_BTNH.dtype).swapaxes(1, 2)


def _blocks(length: int, kv_length: int) -> splash.BlockSizes:
    """The largest blocks up to `BLOCK` that divide the lengths; one fused backward kernel."""

    def largest(n: int) -> int:
        return max(size for size in range(LANES, BLOCK + 1, LANES) if n % size == 0)

    q, kv = largest(length), largest(kv_length)
    return splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        use_fused_bwd_kernel=True,
    )
