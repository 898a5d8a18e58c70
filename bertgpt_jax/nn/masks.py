"""What a query may attend to, said as a description; only the reference attention turns it into an array."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp

from bertgpt_jax.shapes import Array, Heads


@flax.struct.dataclass
class AttentionMask:
    """A conjunction: every part that is given must allow the pair (query t, key s).

    Attributes:
        causal: s's position is not after t's.
        window: t's position minus s's is below this (and above its negative, unless causal).
        prefix_B: keys at positions below this are visible even to earlier queries (prefix LM).
        q_segments_BT, kv_segments_BS: equal ids attend to each other; padding is id 0, and so attends to padding.
        q_positions_BT, kv_positions_BS: what `causal`, `window` and `prefix_B` compare; array indices when absent.
        lengths_B: the segments say no more than that the first so many tokens of each row are real; kernels that take
            lengths read this instead.
        max_segments: segments of a row at most, padding's included, where queries and keys are the same row and each
            segment lies together, ids ascending and padding last; None: not known.
        sees_itself: every query is among the keys, and no part forbids it itself; so no query is left without a key.
        allowed_BNTS: any explicit boolean array broadcastable to [B, N, T, S] (permutation language models).
    """

    q_segments_BT: Array | None = None
    kv_segments_BS: Array | None = None
    q_positions_BT: Array | None = None
    kv_positions_BS: Array | None = None
    prefix_B: Array | None = None
    lengths_B: Array | None = None
    allowed_BNTS: Array | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    max_segments: int | None = flax.struct.field(pytree_node=False, default=None)
    sees_itself: bool = flax.struct.field(pytree_node=False, default=False)

    def to_array(self, q_length: int, kv_length: int) -> Array | None:
        """bool, broadcastable to [B, N, T, S]: True where attention is allowed; None when everything is."""
        q = jnp.arange(q_length)[None] if self.q_positions_BT is None else self.q_positions_BT
        kv = jnp.arange(kv_length)[None] if self.kv_positions_BS is None else self.kv_positions_BS
        distance = q[:, None, :, None] - kv[:, None, None, :]
        parts = []
        if self.causal:
            visible = distance >= 0
            if self.prefix_B is not None:
                visible = visible | (kv[:, None, None, :] < self.prefix_B[:, None, None, None])
            parts.append(visible)
        if self.window is not None:
            parts.append(abs(distance) < self.window)
        if self.q_segments_BT is not None and self.kv_segments_BS is not None:
            parts.append(self.q_segments_BT[:, None, :, None] == self.kv_segments_BS[:, None, None, :])
        if self.allowed_BNTS is not None:
            parts.append(self.allowed_BNTS)
        if not parts:
            return None
        allowed = parts[0]
        for part in parts[1:]:
            allowed = allowed & part
        return allowed

    def may_blind(self, q_length: int, kv_length: int) -> bool:
        """Whether a query may be left without a key."""
        if self.allowed_BNTS is not None:
            return True
        if self.sees_itself:
            return False
        placed = self.q_positions_BT is not None or self.kv_positions_BS is not None
        between = self.q_segments_BT is not None and self.kv_segments_BS is not None
        far = self.window is not None and q_length - kv_length >= self.window
        return between or far or (placed and (self.causal or self.window is not None))


def blind_to_zeros(out_BTNH: Heads, mask: AttentionMask, kv_length: int) -> Heads:
    """What attention gave, with zeros for queries that `mask` leaves no key; untouched where it can leave none so."""
    length = out_BTNH.shape[1]
    if not mask.may_blind(length, kv_length):
        return out_BTNH
    allowed = mask.to_array(length, kv_length)
    sees_BTN1 = jnp.any(allowed, -1).swapaxes(1, 2)[..., None]
    return jnp.where(sees_BTN1, out_BTNH, jnp.zeros((), out_BTNH.dtype))


def untellable(mask: AttentionMask, q_length: int, kv_length: int) -> list[str]:
    """What of a mask no kernel can be told that knows causality and the lengths of rows alone: a sentence each."""
    found = []
    if mask.allowed_BNTS is not None or mask.prefix_B is not None:
        found.append("the mask is an explicit array or has a prefix")
    if mask.q_positions_BT is not None or mask.kv_positions_BS is not None:
        found.append("the mask compares given positions, not places in the row")
    if mask.causal and q_length != kv_length:
        found.append(f"causal attention of {q_length} queries to {kv_length} keys")
    return found


def causal_mask(segments_BT: Array | None = None, max_segments: int | None = None) -> AttentionMask:
    """Each position sees itself and what precedes it in the row, document boundaries ignored (GPT-2, GPT-3).

    With `segments_BT` it sees nothing but its own segment.

    Args:
        max_segments: of a row at most, beside padding, where ids are 1, 2, ... and then 0; None: not known.
    """
    return AttentionMask(
        causal=True,
        sees_itself=True,
        q_segments_BT=segments_BT,
        kv_segments_BS=segments_BT,
        max_segments=None if max_segments is None else max_segments + 1,
    )


def segment_mask(segments_BT: Array, packed: bool = True, max_segments: int | None = None) -> AttentionMask:
    """Bidirectional attention inside each segment id; id 0 is padding.

    Args:
        packed: a row may hold several segments; else it is one, with padding behind it.
        max_segments: of a packed row at most, beside padding, where ids are 1, 2, ... and then 0; None: not known.
    """
    if packed:
        return causal_mask(segments_BT, max_segments).replace(causal=False)
    lengths_B = jnp.sum(segments_BT > 0, axis=1, dtype=jnp.int32)
    return AttentionMask(sees_itself=True, q_segments_BT=segments_BT, kv_segments_BS=segments_BT, lengths_B=lengths_B)
