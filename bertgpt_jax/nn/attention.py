"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1), one signature for every path."""

from __future__ import annotations

import functools
import logging
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn import cudnn, splash
from bertgpt_jax.nn.layers import constrain, dropout
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.shapes import Array, Heads

MASKED = -1e30
"""Logit of a forbidden pair: exp() of it is 0 in fp32 next to any real logit, without the NaN that -inf can give."""


Path = Literal["reference", "splash", "cudnn"]
"""`reference`: XLA, any mask, [T, S] scores in memory; `splash`: Pallas on TPUs; `cudnn`: fused kernels on GPUs."""

PREFERRED: dict[str, Path] = {"tpu": "splash", "gpu": "cudnn"}
"""What `auto` tries first on a platform."""

_KERNELS = {"splash": (splash.obstacles, splash.splash_attention), "cudnn": (cudnn.obstacles, cudnn.cudnn_attention)}

log = logging.getLogger(__name__)


class PathChoice(NamedTuple):
    """How attention is to be computed.

    Attributes:
        wanted: a path that must serve, or `auto`: the platform's best that can.
        platform: what the program is compiled for: cpu, gpu or tpu.
    """

    wanted: Literal["auto"] | Path = "reference"
    platform: str = "cpu"


REFERENCE = PathChoice()


def dot_product_attention(
    q_BTNH: Heads,
    k_BSNH: Heads,
    v_BSNH: Heads,
    mask: AttentionMask,
    dropout_rate: float = 0.0,
    key: Array | None = None,
    choice: PathChoice = REFERENCE,
) -> Heads:
    """softmax(q k^T / sqrt(H)) v under `mask`, softmax in fp32, result in q's dtype.

    A query that the mask leaves nothing to attend to yields zeros.

    Args:
        dropout_rate: of the attention probabilities; applied when `key` is given.

    Raises:
        ConfigError: the wanted path cannot serve; the message says why.
    """
    dropping = key is not None and dropout_rate > 0
    path = choose_path(choice, q_BTNH.shape, k_BSNH.shape[1], q_BTNH.dtype, mask, dropping)
    if path == "reference":
        return reference_attention(q_BTNH, k_BSNH, v_BSNH, mask, dropout_rate, key)
    return _KERNELS[path][1](q_BTNH, k_BSNH, v_BSNH, mask)


def choose_path(
    choice: PathChoice, q_shape: tuple[int, ...], kv_length: int, dtype: jnp.dtype, mask: AttentionMask, dropping: bool
) -> Path:
    """The path that serves these shapes; `auto` says once which it is and why.

    Args:
        q_shape: (B, T, N, H).
        dropping: attention probabilities are dropped.

    Raises:
        ConfigError: the wanted path cannot serve.
    """
    wanted, platform = choice
    path = PREFERRED.get(platform, "reference") if wanted == "auto" else wanted
    if path == "reference":
        return path
    found = _KERNELS[path][0](q_shape, kv_length, dtype, mask, dropping)
    owner = next(name for name, preferred in PREFERRED.items() if preferred == path)
    if owner != platform:
        found = [f"it runs on {owner}, not on {platform}", *found]
    shape = f"{q_shape[1]} x {kv_length}, {q_shape[2]} heads of {q_shape[3]}, {jnp.dtype(dtype).name}"
    if found and wanted != "auto":
        raise ConfigError(
            f"execution.compute.attention = '{wanted}' cannot serve {shape}: {'; '.join(found)}; use auto or reference"
        )
    chosen = "reference" if found else path
    _say_once(f"attention ({shape}): {chosen}" + (f", as {path} cannot serve: {'; '.join(found)}" if found else ""))
    return chosen


@functools.cache
def _say_once(message: str) -> None:
    log.info(message)


def reference_attention(
    q_BTNH: Heads,
    k_BSNH: Heads,
    v_BSNH: Heads,
    mask: AttentionMask,
    dropout_rate: float = 0.0,
    key: Array | None = None,
) -> Heads:
    """`dot_product_attention` by XLA's own operations, which every other path is held against."""
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
                both_BNSH = jnp.concatenate([old_BNSH, new_BNTH], 2)
            elif old_BNSH.shape[0] == 1:  # the shape in which XLA reads it; in another, it would be written twice
                both_BNSH = jax.lax.dynamic_update_slice_in_dim(old_BNSH[0], new_BNTH[0], slot, 1)[None]
            else:
                both_BNSH = jax.lax.dynamic_update_slice_in_dim(old_BNSH, new_BNTH, slot, 2)
            return constrain(both_BNSH, "batch", "act_heads", None, None)

        return KeyValues(extend(self.k_BNSH, k_BTNH), extend(self.v_BNSH, v_BTNH))
