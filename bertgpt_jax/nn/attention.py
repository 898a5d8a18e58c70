"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1), one signature for every path."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn import cudnn, ring, sequence, splash, tokamax_attention
from bertgpt_jax.nn.layers import constrain, dropout
from bertgpt_jax.nn.masks import AttentionMask, blind_to_zeros
from bertgpt_jax.shapes import Array, Heads

MASKED = -1e30
"""Logit of a forbidden pair: exp() of it is 0 in fp32 next to any real logit, without the NaN that -inf can give."""


Path = Literal["reference", "splash", "cudnn", "tokamax"]
"""`reference`: XLA, any mask, [T, S] scores in memory; `splash`: Pallas on TPUs; `cudnn`: fused kernels on GPUs;
`tokamax`: a library of kernels, by name only."""

PREFERRED: dict[str, Path] = {"tpu": "splash", "gpu": "cudnn"}
"""What `auto` tries first on a platform."""

Form = Literal["all_gather", "ring"]
"""Where a mesh splits the sequence: every device gathers all keys and values of a layer, or they go round."""

_KERNELS = {"splash": splash.obstacles, "cudnn": cudnn.obstacles, "tokamax": tokamax_attention.obstacles}
"""Why a kernel cannot serve."""

log = logging.getLogger(__name__)


class PathChoice(NamedTuple):
    """How attention is to be computed.

    Attributes:
        wanted: a path that must serve, or `auto`: the platform's best that can.
        platform: what the program is compiled for: cpu, gpu or tpu.
        form: of attention over a sequence that the mesh splits; `auto`: gathered where a kernel computes it, else the
            ring if it can serve.
        zigzag: sequences that the mesh splits lie in zigzag order (`nn.sequence`).
        emulate: splash may run on other platforms, emulated.
    """

    wanted: Literal["auto"] | Path = "reference"
    platform: str = "cpu"
    form: Literal["auto"] | Form = "auto"
    zigzag: bool = False
    emulate: bool = False


REFERENCE = PathChoice()


class AttentionCase(NamedTuple):
    """What is to be computed, as far as it decides what can compute it.

    Attributes:
        q_shape: (B, T, N, H).
        kv_length: S, keys of a row.
        dtype: of queries, keys and values.
        dropping: attention probabilities are dropped.
        shards: parts into which the mesh splits the queries; each sees all keys.
    """

    q_shape: tuple[int, ...]
    kv_length: int
    dtype: jnp.dtype
    mask: AttentionMask
    dropping: bool = False
    shards: int = 1

    def describe(self) -> str:
        """`1024 x 1024 in 2 shards, 12 heads of 64, bfloat16`."""
        (_, length, heads, width), parts = self.q_shape, f" in {self.shards} shards" if self.shards > 1 else ""
        return f"{length} x {self.kv_length}{parts}, {heads} heads of {width}, {jnp.dtype(self.dtype).name}"


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

    A query that the mask leaves nothing to attend to yields zeros. Where the mesh in force splits the sequence, causal
    masks and windows mean the sequence's own order, however it lies.

    Args:
        dropout_rate: of the attention probabilities; applied when `key` is given.

    Raises:
        ConfigError: the wanted path cannot serve; the message says why.
    """
    dropping = key is not None and dropout_rate > 0
    shards = sequence.split().shards if q_BTNH.shape[1] == k_BSNH.shape[1] else 1
    zigzag = choice.zigzag and shards > 1
    path = choose(choice, AttentionCase(q_BTNH.shape, k_BSNH.shape[1], q_BTNH.dtype, mask, dropping, shards))
    if path == "ring":
        return ring.ring_attention(q_BTNH, k_BSNH, v_BSNH, mask, zigzag)
    if path == "splash":
        emulated = choice.emulate and choice.platform != "tpu"
        return splash.splash_attention(q_BTNH, k_BSNH, v_BSNH, mask, zigzag, emulated)
    if path == "cudnn":
        return cudnn.cudnn_attention(q_BTNH, k_BSNH, v_BSNH, mask)
    if path == "tokamax":
        return tokamax_attention.tokamax_attention(q_BTNH, k_BSNH, v_BSNH, mask)
    if shards > 1:
        k_BSNH, v_BSNH = (constrain(x, "batch", None, "act_heads", None) for x in (k_BSNH, v_BSNH))
    order = sequence.zigzag_order(q_BTNH.shape[1], shards) if zigzag else None
    return reference_attention(q_BTNH, k_BSNH, v_BSNH, mask, dropout_rate, key, order)


def choose(
    choice: PathChoice,
    case: AttentionCase,
) -> Literal["ring"] | Path:
    """What computes attention: a ring, or the path that serves; what `auto` takes, and why, is said once for a case.

    Raises:
        ConfigError: what is wanted cannot serve; the message says why.
    """
    if case.shards > 1 and choose_form(choice, case) == "ring":
        return "ring"
    return choose_path(choice, case)


def choose_form(
    choice: PathChoice,
    case: AttentionCase,
) -> Form:
    """How a sequence in `shards` parts attends to itself; `auto` says once which it is and why.

    Raises:
        ConfigError: a ring is wanted and cannot serve.
    """
    found = ring.obstacles(case.q_shape, case.kv_length, case.mask, case.dropping)
    if choice.wanted in _KERNELS:
        found = [f"it is computed by XLA, and execution.compute.attention = '{choice.wanted}'", *found]
    if choice.form == "ring" and found:
        raise ConfigError(
            f"execution.compute.context_attention = 'ring' cannot serve {case.describe()}: {'; '.join(found)}; "
            "use auto or all_gather"
        )
    if choice.form != "auto":
        return choice.form
    path, why = _found_path(choice, case)
    chosen = "all_gather" if found or path != "reference" else "ring"
    if chosen == "all_gather" and path == "reference":
        why = f"{why}; keys and values are gathered, as a ring cannot serve: {'; '.join(found)}"
    said = f"ring, {why}" if chosen == "ring" else f"{path}, {why}"
    _say_once(choice, case, said)
    return chosen


def choose_path(
    choice: PathChoice,
    case: AttentionCase,
) -> Path:
    """The path that serves these shapes; what is chosen, and why, is said once for shapes and a mask.

    That is what training has, which drops probabilities where the model does; evaluation may have a faster one.

    Raises:
        ConfigError: the wanted path cannot serve.
    """
    path, why = _found_path(choice, case)
    if choice.wanted != "reference":
        _say_once(choice, case, f"{path}, {why}")
    return path


def _found_path(
    choice: PathChoice,
    case: AttentionCase,
) -> tuple[Path, str]:
    """`choose_path`, and why it is that one."""
    wanted, platform = choice.wanted, choice.platform
    path = PREFERRED.get(platform, "reference") if wanted == "auto" else wanted
    if path == "reference":
        return path, f"the path of {platform}" if wanted == "auto" else "as asked for"
    found = _KERNELS[path](*case)
    owner = next((name for name, preferred in PREFERRED.items() if preferred == path), platform)
    if owner != platform and not (choice.emulate and path == "splash"):
        found = [f"it runs on {owner}, not on {platform}", *found]
    if not found:
        return path, f"the kernel of {platform} serves" if wanted == "auto" else "as asked for"
    if wanted == "auto":
        return "reference", f"as {path} cannot serve: {'; '.join(found)}"
    raise ConfigError(
        f"execution.compute.attention = '{wanted}' cannot serve {case.describe()}: {'; '.join(found)}; "
        "use auto or reference"
    )


_said: set[Hashable] = set()


def _say_once(choice: PathChoice, case: AttentionCase, said: str) -> None:
    """Logs what is said first of a choice, shapes and a kind of mask."""
    what = choice, case.describe(), jax.tree.structure(case.mask)
    if what not in _said:
        _said.add(what)
        log.info(f"attention ({case.describe()}): {said}")


def reference_attention(
    q_BTNH: Heads,
    k_BSNH: Heads,
    v_BSNH: Heads,
    mask: AttentionMask,
    dropout_rate: float = 0.0,
    key: Array | None = None,
    order: np.ndarray | None = None,
) -> Heads:
    """`dot_product_attention` by XLA's own operations, which every other path is held against.

    Args:
        order: int32 [T], which token lies at each place of a sequence that attends to itself; None: its own order.
    """
    if order is not None:
        mask = mask.replace(q_positions_BT=order[None], kv_positions_BS=order[None])
    # [B, N] leading: both products are then plain batched matrix products, on every platform the fastest layout.
    q_BNTH, k_BNSH, v_BNSH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSNH, v_BSNH))
    scores_BNTS = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH * q_BTNH.shape[-1] ** -0.5, k_BNSH)
    scores_BNTS = scores_BNTS.astype(jnp.float32)
    allowed = mask.to_array(q_BTNH.shape[1], k_BSNH.shape[1])
    if allowed is not None:
        scores_BNTS = jnp.where(allowed, scores_BNTS, MASKED)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
    arrange = None if order is None else lambda keep_BNTS: keep_BNTS[:, :, order][..., order]
    weights_BNTS = dropout(weights_BNTS.astype(q_BTNH.dtype), dropout_rate, key, arrange)
    return blind_to_zeros(jnp.einsum("BNTS,BNSH->BNTH", weights_BNTS, v_BNSH).swapaxes(1, 2), mask, k_BSNH.shape[1])


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
