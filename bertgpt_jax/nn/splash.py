"""Attention by the Pallas splash kernel on TPUs: no [T, S] array in memory, masked blocks are not computed.

Kernel: jax.experimental.pallas.ops.tpu.splash_attention (public in jax 0.10 to 0.12). It computes scores and softmax in
fp32 and takes the static part of a mask (causal, window) apart from segment ids.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from bertgpt_jax.nn import sequence
from bertgpt_jax.nn.masks import AttentionMask, blind_to_zeros
from bertgpt_jax.shapes import Array, Heads

LANES = 128
"""Sequence lengths are a multiple of this; the kernel's smallest block."""

BLOCK = 512
"""Largest block of queries and of keys: 512 x 512 fp32 scores are 1 MiB of a core's vector memory."""

HEAD_SIZES = (64, 128, 256)
"""Head widths that compile; at 64 half of every vector register is empty."""


def obstacles(
    q_shape: tuple[int, ...], kv_length: int, dtype: jnp.dtype, mask: AttentionMask, dropping: bool, shards: int = 1
) -> list[str]:
    """Why the kernel cannot serve these shapes and this mask; empty if it can.

    Args:
        q_shape: (B, T, N, H).
        dtype: of queries, keys and values; fp32 and bf16 both serve.
        dropping: attention probabilities are dropped.
        shards: parts into which the mesh splits the queries.
    """
    _, length, _, head_size = q_shape
    found = []
    if length % LANES or kv_length % LANES:
        found.append(f"lengths {length} and {kv_length} are not multiples of {LANES}")
    elif length % (LANES * shards):
        found.append(f"length {length} in {shards} shards is not a multiple of {LANES * shards}")
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
    q_BTNH: Heads,
    k_BSNH: Heads,
    v_BSNH: Heads,
    mask: AttentionMask,
    zigzag: bool = False,
    interpret: bool = False,
) -> Heads:
    """softmax(q k^T / sqrt(H)) v under `mask`, result in q's dtype; call it where `obstacles` finds none.

    A query that the mask leaves nothing to attend to yields zeros.

    Runs on each device's rows and heads alone (`jax.shard_map` over the mesh in force, split as the logical axes of
    activations say). Where the mesh splits the sequence, a device gathers all keys and values for its queries, and
    skips the blocks that are masked for them.

    Args:
        zigzag: a sequence that the mesh splits lies in zigzag order (`nn.sequence`).
        interpret: emulates the kernel on any platform, slowly.
    """
    out_BTNH = _attend(q_BTNH, k_BSNH, v_BSNH, mask, zigzag, interpret)
    if zigzag:
        order = sequence.zigzag_order(q_BTNH.shape[1], sequence.split().shards)[None]
        mask = mask.replace(q_positions_BT=order, kv_positions_BS=order)
    return blind_to_zeros(out_BTNH, mask, k_BSNH.shape[1])


def _attend(q_BTNH: Heads, k_BSNH: Heads, v_BSNH: Heads, mask: AttentionMask, zigzag: bool, interpret: bool) -> Heads:
    """`splash_attention`, queries without a key left as the kernel leaves them: with the mean of some values."""
    segments = (mask.q_segments_BT, mask.kv_segments_BS)
    if segments[0] is None:  # the kernel is mapped over rows, so every row brings its own
        segments = None
    (_, length, heads, _), lies = q_BTNH.shape, sequence.split()
    make, shape = partial(_kernel, mask, interpret=interpret), (heads, length, k_BSNH.shape[1])
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _local_attention(sequence.WHOLE, False, make(shape), q_BTNH, k_BSNH, v_BSNH, segments)
    spec = nn.logical_to_mesh_axes(("batch", "length", "act_heads", None))
    # axes that a `shard_map` around this one has taken are not in the spec, and shapes of shards cannot be asked for
    by_head = NamedSharding(AbstractMesh(mesh.axis_sizes, mesh.axis_names), PartitionSpec(spec[2], spec[1]))
    local_heads, local_length = by_head.shard_shape((heads, length))
    if mask.causal or mask.window is not None:
        kernel = make(shape, head_shards=heads // local_heads, shards=lies.shards, zigzag=zigzag)
    else:  # the same on every device (jax fails to divide the description of a mask that leaves nothing out)
        kernel = make((local_heads, local_length, shape[2]))
        by_head = NamedSharding(by_head.mesh, PartitionSpec(None, None))
    mapped = jax.shard_map(
        partial(_local_attention, lies, zigzag),
        in_specs=(kernel.manual_sharding_spec(by_head), spec, spec, spec, PartitionSpec(*spec[:2])),
        out_specs=spec,
        check_vma=False,
    )  # the kernel's outputs carry no record of which mesh axes they vary over
    return mapped(kernel, q_BTNH, k_BSNH, v_BSNH, segments)


def _kernel(
    mask: AttentionMask,
    shape: tuple[int, int, int],
    head_shards: int = 1,
    shards: int = 1,
    zigzag: bool = False,
    interpret: bool = False,
) -> Callable:
    """The kernel for `shape` (N, T, S) of the whole attention, of which a device computes its heads and queries."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and for TPUs alone

    heads, lengths = shape[0], shape[1:]
    if mask.window is not None:
        static = splash.LocalMask(lengths, (mask.window - 1, 0 if mask.causal else mask.window - 1), 0)
    else:
        static = splash.CausalMask(lengths) if mask.causal else splash.FullMask(lengths)
    if zigzag:
        static.q_sequence = sequence.zigzag_order(lengths[0], shards)
    return splash.make_splash_mha(
        splash.MultiHeadMask([static] * heads),
        block_sizes=splash.BlockSizes(**_blocks(lengths[0] // shards, lengths[1])),
        head_shards=head_shards,
        q_seq_shards=shards,
        interpret=interpret,
    )


def _local_attention(
    lies: sequence.Split,
    zigzag: bool,
    kernel: Callable,
    q_BTNH: Heads,
    k_BSNH: Heads,
    v_BSNH: Heads,
    segments: tuple[Array, Array] | None,
) -> Heads:
    """One device's queries with all keys."""
    q_BNTH = (q_BTNH * q_BTNH.shape[-1] ** -0.5).swapaxes(1, 2)
    k_BNSH, v_BNSH = (sequence.gathered(x, lies, zigzag).swapaxes(1, 2) for x in (k_BSNH, v_BSNH))
    if segments is None:
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BNSH, v_BNSH)
    else:
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        q_segments, kv_segments = (s.astype(jnp.int32) for s in segments)
        ids = SegmentIds(q_segments, sequence.gathered(kv_segments, lies, zigzag))
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BNSH, v_BNSH, ids)
    return out_BNTH.astype(q_BTNH.dtype).swapaxes(1, 2)


def _blocks(length: int, kv_length: int) -> dict[str, Any]:
    """`splash.BlockSizes`: the largest up to `BLOCK` that divide the lengths; one fused backward kernel."""

    def largest(n: int) -> int:
        return max(size for size in range(LANES, BLOCK + 1, LANES) if n % size == 0)

    q, kv = largest(length), largest(kv_length)
    return dict(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        use_fused_bwd_kernel=True,
    )
