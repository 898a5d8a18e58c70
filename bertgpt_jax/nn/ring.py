"""Attention over a sequence that is split over devices: keys and values go round, queries stay (Liu et al. 2023).

Softmax is online: each query keeps the largest score so far, the sum and the weighted values relative to it, fp32
(Milakov & Gimelshein 2018; tiles as in Dao et al. 2022, algorithm 1). The backward pass goes round again, keys and
values with their gradients. Scores exist a tile at a time, and no device ever holds more keys than its own and the
block on its way; tiles in which the mask allows no pair by position are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bertgpt_jax.nn import sequence
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.shapes import Array, Heads

MASKED = -1e30
"""Score of a forbidden pair, and the largest of none."""

TILE = 512
"""Most queries and keys of a tile: 512 x 512 fp32 scores are 1 MiB a head and row."""


class _Settings(NamedTuple):
    causal: bool
    window: int | None
    zigzag: bool
    shards: int
    axes: tuple[str, ...]
    heads: PartitionSpec
    rows: PartitionSpec
    tile: int


class _Softmax(NamedTuple):
    """What queries have seen so far, fp32: the largest score and the sum of exp(score - largest) [B, N, T], and that
    sum weighted with the values [B, N, T, H]."""

    largest: Array
    total: Array
    mixed: Array


def obstacles(q_shape: tuple[int, ...], kv_length: int, mask: AttentionMask, dropping: bool) -> list[str]:
    """Why a ring cannot serve these shapes and this mask; empty if it can.

    Args:
        q_shape: (B, T, N, H) of the whole sequence.
        dropping: attention probabilities are dropped.
    """
    found = []
    if q_shape[1] != kv_length:
        found.append(f"{q_shape[1]} queries to {kv_length} keys, not a sequence to itself")
    if dropping:
        found.append("it has no dropout of attention probabilities (set model.attention_dropout=0)")
    if mask.allowed_BNTS is not None or mask.prefix_B is not None:
        found.append("the mask is an explicit array or has a prefix")
    if mask.q_positions_BT is not None or mask.kv_positions_BS is not None:
        found.append("the mask compares given positions, not places in the row")
    return found


def ring_attention(
    q_BTNH: Heads, k_BSNH: Heads, v_BSNH: Heads, mask: AttentionMask, zigzag: bool = False, tile: int = TILE
) -> Heads:
    """softmax(q k^T / sqrt(H)) v under `mask`, result in q's dtype; call it where `obstacles` finds none.

    A query that the mask leaves nothing to attend to yields zeros. Rows, heads and sequence are split over the mesh in
    force as the logical axes of activations say; the shards divide the sequence (twice, in zigzag).

    Args:
        zigzag: the sequence lies in zigzag order; causal masks and windows mean its own.
        tile: most queries and keys of a tile.
    """
    lies = sequence.split()
    heads, rows = (
        nn.logical_to_mesh_axes(axes) for axes in (("batch", "length", "act_heads", None), ("batch", "length"))
    )
    local = q_BTNH.shape[1] // lies.shards
    chunk = local // 2 if zigzag else local
    tile = next(size for size in range(min(tile, chunk), 0, -1) if chunk % size == 0)
    settings = _Settings(mask.causal, mask.window, zigzag, lies.shards, lies.axes, heads, rows, tile)
    segments = None if mask.q_segments_BT is None else (mask.q_segments_BT, mask.kv_segments_BS)
    return _ring(settings, q_BTNH, k_BSNH, v_BSNH, segments)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(settings: _Settings, q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, segments: tuple | None) -> Array:
    return _forward(settings, q_BTNH, k_BSNH, v_BSNH, segments)[0]


def _forward(settings: _Settings, q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, segments: tuple | None):
    s, normaliser = settings, PartitionSpec(settings.heads[0], settings.heads[2], settings.heads[1])
    mapped = jax.shard_map(
        partial(_local_forward, s),
        in_specs=(s.heads, s.heads, s.heads, s.rows),
        out_specs=(s.heads, normaliser),
        check_vma=False,
    )
    out_BTNH, log_total_BNT = mapped(q_BTNH, k_BSNH, v_BSNH, segments)
    return out_BTNH, (q_BTNH, k_BSNH, v_BSNH, segments, out_BTNH, log_total_BNT)


def _backward(settings: _Settings, saved: tuple, dout_BTNH: Array):
    s, normaliser = settings, PartitionSpec(settings.heads[0], settings.heads[2], settings.heads[1])
    mapped = jax.shard_map(
        partial(_local_backward, s),
        in_specs=(s.heads, s.heads, s.heads, s.rows, s.heads, normaliser, s.heads),
        out_specs=(s.heads,) * 3,
        check_vma=False,
    )
    return *mapped(*saved, dout_BTNH), None


_ring.defvjp(_forward, _backward)


def _send(settings: _Settings, tree: Any) -> Any:
    """To the next device of the ring."""
    around = [(i, (i + 1) % settings.shards) for i in range(settings.shards)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, settings.axes, around), tree)


def _indices(settings: _Settings, length: int, step: Array) -> Array:
    """Which tokens the block that is here in a step holds: that of the device so many before this one."""
    shard = (jax.lax.axis_index(settings.axes) - step) % settings.shards
    return sequence.indices(shard, length * settings.shards, settings.shards, settings.zigzag)


def _tiles(x_BNTX: Array, tile: int) -> Array:
    """[B, N, T, ...] or [B, T] -> [T / t, B, (N,) t, ...]."""
    axis = 1 if x_BNTX.ndim == 2 else 2
    shape = (*x_BNTX.shape[:axis], x_BNTX.shape[axis] // tile, tile, *x_BNTX.shape[axis + 1 :])
    return jnp.moveaxis(x_BNTX.reshape(shape), axis, 0)


def _whole(tiles: Array) -> Array:
    """The inverse of `_tiles` for [T / t, B, N, t, ...]."""
    x = jnp.moveaxis(tiles, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


class _Keys(NamedTuple):
    """Tiles of a block: keys and values [., B, N, s, H], segments [., B, s] or None, token indices [., s]."""

    k: Array
    v: Array
    segments: Array | None
    indices: Array


class _Queries(NamedTuple):
    """Tiles of queries [., B, N, t, H] (already divided by sqrt(H)), their segments and indices as in `_Keys`."""

    q: Array
    segments: Array | None
    indices: Array


def _any_allowed(settings: _Settings, q: _Queries, kv: _Keys) -> Array | bool:
    """Whether positions leave a tile any pair."""
    nearest = jnp.max(q.indices) - jnp.min(kv.indices)
    wanted = nearest >= 0 if settings.causal else True
    if settings.window is not None:
        wanted &= jnp.min(q.indices) - jnp.max(kv.indices) < settings.window
        wanted &= nearest > -settings.window
    return wanted


def _scores(settings: _Settings, q: _Queries, kv: _Keys) -> tuple[Array, Array | None]:
    """fp32 scores of a tile [B, N, t, s] and which pairs are allowed, None if all."""
    mask = AttentionMask(
        q_segments_BT=q.segments,
        kv_segments_BS=kv.segments,
        q_positions_BT=q.indices[None],
        kv_positions_BS=kv.indices[None],
        causal=settings.causal,
        window=settings.window,
    )
    scores = jnp.einsum("BNTH,BNSH->BNTS", q.q, kv.k, preferred_element_type=jnp.float32)
    return scores, mask.to_array(q.q.shape[2], kv.k.shape[2])


def _only(allowed: Array | None, x: Array, otherwise: float) -> Array:
    return x if allowed is None else jnp.where(allowed, x, otherwise)


def _see(settings: _Settings, q: _Queries, seen: _Softmax, kv: _Keys) -> _Softmax:
    """One tile of queries after one more tile of keys."""

    def more(seen: _Softmax) -> _Softmax:
        scores, allowed = _scores(settings, q, kv)
        largest = jnp.maximum(seen.largest, jnp.max(_only(allowed, scores, MASKED), -1))
        weights = _only(allowed, jnp.exp(scores - largest[..., None]), 0.0)
        before = jnp.exp(seen.largest - largest)
        values = jnp.einsum("BNTS,BNSH->BNTH", weights.astype(kv.v.dtype), kv.v, preferred_element_type=jnp.float32)
        return _Softmax(largest, seen.total * before + jnp.sum(weights, -1), seen.mixed * before[..., None] + values)

    return _where_needed(_any_allowed(settings, q, kv), more, seen)


def _where_needed(wanted: Array | bool, more: Callable, state: Any) -> Any:
    return more(state) if wanted is True else jax.lax.cond(wanted, more, lambda same: same, state)


def _loop(start: int, stop: int, body: Callable, state: Any) -> Any:
    """body(step, state) for each step, as a `while`.

    Of a scan, jax would compute ahead, and keep for the layers of a model, all that depends on no operand: the masks.
    """
    after = jax.lax.while_loop(
        lambda carry: carry[0] < stop, lambda carry: (carry[0] + 1, body(*carry)), (jnp.int32(start), state)
    )
    return after[1]


def _local_forward(s: _Settings, q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, segments: tuple | None):
    """What one device computes: its queries' outputs [B, T/n, N, H] and log-sum-exps [B, N, T/n]."""
    queries = _queries(s, q_BTNH, segments)
    block = (k_BSNH.swapaxes(1, 2), v_BSNH.swapaxes(1, 2), None if segments is None else segments[1])

    def see_block(seen: _Softmax, block: tuple, step: Array) -> _Softmax:
        keys = _keys(s, block, step)

        def one(_, tile: tuple[_Queries, _Softmax]) -> tuple[None, _Softmax]:
            q, state = tile
            return None, jax.lax.scan(lambda state, kv: (_see(s, q, state, kv), None), state, keys)[0]

        return jax.lax.scan(one, None, (queries, seen))[1]

    def one_step(step: Array, carry: tuple) -> tuple:
        seen, block = carry
        following = _send(s, block)  # does not wait for what is computed of the present block
        return see_block(seen, block, step), following

    shape = queries.q.shape
    nothing = _Softmax(
        jnp.full(shape[:-1], MASKED, jnp.float32), jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(shape, jnp.float32)
    )
    seen, block = _loop(0, s.shards - 1, one_step, (nothing, block))
    seen = _loop(s.shards - 1, s.shards, lambda step, seen: see_block(seen, block, step), seen)
    total = jnp.where(seen.total > 0, seen.total, 1.0)
    out_BNTH = _whole(seen.mixed / total[..., None]).astype(q_BTNH.dtype)
    return out_BNTH.swapaxes(1, 2), _whole(seen.largest + jnp.log(total))


def _queries(s: _Settings, q_BTNH: Array, segments: tuple | None) -> _Queries:
    q_BNTH = (q_BTNH * q_BTNH.shape[-1] ** -0.5).swapaxes(1, 2)
    indices = _indices(s, q_BTNH.shape[1], jnp.int32(0)).reshape(-1, s.tile)
    return _Queries(_tiles(q_BNTH, s.tile), None if segments is None else _tiles(segments[0], s.tile), indices)


def _keys(s: _Settings, block: tuple, step: Array) -> _Keys:
    k_BNSH, v_BNSH, segments_BS = block
    indices = _indices(s, k_BNSH.shape[2], step).reshape(-1, s.tile)
    segments = None if segments_BS is None else _tiles(segments_BS, s.tile)
    return _Keys(_tiles(k_BNSH, s.tile), _tiles(v_BNSH, s.tile), segments, indices)


def _local_backward(s: _Settings, q_BTNH, k_BSNH, v_BSNH, segments, out_BTNH, log_total_BNT, dout_BTNH):
    """Gradients of one device's queries, keys and values; those of keys and values come home with their block."""
    queries = _queries(s, q_BTNH, segments)
    # of each query: its output's gradient, log-sum-exp, and sum of weight x weight's gradient = out . dout
    inner_BNT = jnp.einsum("BTNH,BTNH->BNT", out_BTNH, dout_BTNH, preferred_element_type=jnp.float32)
    saved = _tiles(dout_BTNH.swapaxes(1, 2), s.tile), _tiles(log_total_BNT, s.tile), _tiles(inner_BNT, s.tile)
    block = (k_BSNH.swapaxes(1, 2), v_BSNH.swapaxes(1, 2), None if segments is None else segments[1])

    def block_gradients(dq: Array, block: tuple, step: Array) -> tuple[Array, tuple[Array, Array]]:
        """dq with this block's share, fp32 tiles, and the block's own gradients from this device's queries, fp32."""

        def one(dq: Array, kv: _Keys) -> tuple[Array, tuple[Array, Array]]:
            zeros = jnp.zeros(kv.k.shape, jnp.float32)
            dkv, more = jax.lax.scan(partial(_tile_gradients, s, kv), (zeros, zeros), (queries, saved))
            return dq + more, dkv

        dq, dkv = jax.lax.scan(one, dq, _keys(s, block, step))
        return dq, jax.tree.map(_whole, dkv)

    def one_step(carry: tuple, step: Array) -> tuple[tuple, None]:
        dq, block, dkv = carry
        following, arrived = _send(s, block), _send(s, dkv)  # neither waits for what is computed here
        dq, more = block_gradients(dq, block, step)
        return (dq, following, jax.tree.map(jnp.add, arrived, more)), None

    dq, dkv = block_gradients(jnp.zeros(queries.q.shape, jnp.float32), block, jnp.int32(0))
    (dq, block, dkv), _ = jax.lax.scan(one_step, (dq, _send(s, block), dkv), jnp.arange(1, s.shards - 1))
    dq, more = block_gradients(dq, block, jnp.int32(s.shards - 1))
    dk, dv = _send(s, jax.tree.map(jnp.add, _send(s, dkv), more))
    dq = _whole(dq) * q_BTNH.shape[-1] ** -0.5
    return tuple(g.swapaxes(1, 2).astype(x.dtype) for g, x in ((dq, q_BTNH), (dk, k_BSNH), (dv, v_BSNH)))


def _tile_gradients(s: _Settings, kv: _Keys, dkv: tuple[Array, Array], tile: tuple) -> tuple[tuple, Array]:
    """(dk, dv) of a tile of keys with one tile of queries added, and those queries' gradient from these keys."""
    q, (dout, log_total, inner) = tile

    def more(state: tuple) -> tuple:
        (dk, dv), _ = state
        scores, allowed = _scores(s, q, kv)
        weights = _only(allowed, jnp.exp(scores - log_total[..., None]), 0.0)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        dv = dv + product("BNTS,BNTH->BNSH", weights.astype(dout.dtype), dout)
        dscores = weights * (product("BNTH,BNSH->BNTS", dout, kv.v) - inner[..., None])
        dscores = dscores.astype(q.q.dtype)
        dk = dk + product("BNTS,BNTH->BNSH", dscores, q.q)
        return (dk, dv), product("BNTS,BNSH->BNTH", dscores, kv.k)

    return _where_needed(_any_allowed(s, q, kv), more, (dkv, jnp.zeros(q.q.shape, jnp.float32)))
