"""Packed rows by cuDNN's fused kernels: each segment attends to itself, told as offsets and lengths into the row.

`jax.nn` has no way to say it, so this module, and no other, calls the function beneath it, which is private
(jax/_src/cudnn/fused_attention_stablehlo.py). What is known of it is checked; a jax that differs gets another path.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from bertgpt_jax.nn.by_device import local_shape, on_each_device
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.shapes import Array, Heads

LAST_KNOWN_JAX = (0, 12)
"""The newest minor release of jax whose private function has been read."""

_PARAMETERS = {
    *("query", "key", "value", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"),
    *("scale", "mask_type", "qkv_layout"),
}
_MOST_ELEMENTS = 2**31 - 1
"""Offsets are int32 and count elements."""


def obstacles(q_shape: tuple[int, ...], kv_length: int, mask: AttentionMask) -> list[str]:
    """Why the kernels cannot serve rows of several segments, beside what stops them anyway: one sentence or none.

    Args:
        q_shape: (B, T, N, H).
    """
    private, why = private_kernels()
    found = []
    if private is None:
        found.append(f"jax tells cuDNN by a private function, and {why}")
    elif not private.check_compute_capability("9.0"):
        found.append("jax sees no GPU of compute capability 9.0 (Hopper) or later")
    if mask.max_segments is None:
        found.append("how many at most is not known (set objective.examples.max_segments)")
    if q_shape[1] != kv_length:
        found.append("queries and keys are not the same")
    if mask.window is not None:
        found.append("there is a window in them")
    if np.prod(local_shape(q_shape), dtype=np.int64) > _MOST_ELEMENTS:
        found.append(f"a device's queries {local_shape(q_shape)} are more than 2^31 numbers")
    return [f"rows hold several segments: {', '.join(found)}"] if found else []


@functools.cache
def private_kernels() -> tuple[ModuleType | None, str]:
    """jax's module of cuDNN attention; or None, and in what it is not the one that is known."""
    if jax.__version_info__[:2] > LAST_KNOWN_JAX:
        return None, f"jax {jax.__version__} is newer than {'.'.join(map(str, LAST_KNOWN_JAX))}, the last one known"
    try:
        from jax._src.cudnn import fused_attention_stablehlo as private

        missing = _PARAMETERS - set(inspect.signature(private.dot_product_attention).parameters)
        segments = private.get_max_seg_per_batch(np.zeros((1, 4), np.int32))
        known = (private.MaskType.PADDING, private.MaskType.PADDING_CAUSAL, private.check_compute_capability)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        return None, f"that of jax {jax.__version__} is another one ({error})"
    if missing or segments != 3 or not callable(known[-1]):
        return None, f"that of jax {jax.__version__} is another one (it lacks {', '.join(sorted(missing)) or 'M + 1'})"
    return private, ""


def packed_attention(q_BTNH: Heads, k_BTNH: Heads, v_BTNH: Heads, mask: AttentionMask) -> Heads:
    """softmax(q k^T / sqrt(H)) v inside each segment, result in q's dtype; call it where `obstacles` finds none.

    Padding (id 0) is a segment like the others, as it is for the reference; so no token is left out, whose place in the
    result the kernel would leave as it found it. Rows with more segments than `mask.max_segments`, or with a segment in
    two parts, yield NaN, which stops a run: the kernel cannot compute what they mean.
    """
    return on_each_device(
        functools.partial(_attend, most=mask.max_segments, causal=mask.causal),
        (q_BTNH, k_BTNH, v_BTNH),
        mask.q_segments_BT,
    )


def _attend(q_BTNH: Heads, k_BTNH: Heads, v_BTNH: Heads, segments_BT: Array, *, most: int, causal: bool) -> Heads:
    private, _ = private_kernels()
    offsets, lengths_BM, broken_B = segment_places(segments_BT, max(most, 2))
    # The first query of a row stands for the row: adding to one place is done where the array lies, and has no effect
    # on gradients, while choosing between the whole result and NaN would read and write it once more.
    q_BTNH = q_BTNH.at[:, 0].add(jnp.where(broken_B, jnp.nan, 0.0).astype(q_BTNH.dtype)[:, None, None])
    return private.dot_product_attention(
        q_BTNH,
        k_BTNH,
        v_BTNH,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q_BTNH.shape[-1] ** -0.5,
        mask_type=private.MaskType.PADDING_CAUSAL if causal else private.MaskType.PADDING,
        qkv_layout="BTNH",
    )


def segment_places(segments_BT: Array, most: int) -> tuple[Array, Array, Array]:
    """Where the segments of rows lie, as cuDNN is told it.

    Args:
        segments_BT: int32 ids, each in one run: ascending, and then padding, 0, or none.
        most: M, segments of a row at most, padding's included.

    Returns:
        offsets: int32 [B, M + 1], the first token of each segment; -1 behind the last one, and in the last column.
        lengths: int32 [B, M], its tokens; -1 behind the last one.
        broken: bool [B], rows that are not as they should be; their offsets and lengths mean nothing.
    """
    before, after = segments_BT[:, :-1], segments_BT[:, 1:]
    change = before != after
    ordered = ~change | ((before != 0) & ((after > before) | (after == 0)))
    number_BT = jnp.pad(jnp.cumsum(change, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    numbers_M = jnp.arange(most, dtype=jnp.int32)
    lengths_BM = jnp.sum(number_BT[:, :, None] == numbers_M, axis=1, dtype=jnp.int32)
    offsets_BM = jnp.cumsum(lengths_BM, axis=1) - lengths_BM
    held_B = number_BT[:, -1] + 1
    used = numbers_M < held_B[:, None]
    offsets = jnp.pad(jnp.where(used, offsets_BM, -1), ((0, 0), (0, 1)), constant_values=-1)
    return offsets, jnp.where(used, lengths_BM, -1), (held_B > most) | ~jnp.all(ordered, axis=1)
