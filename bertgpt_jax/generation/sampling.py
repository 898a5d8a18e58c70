"""Which token comes next: filters of the distribution, and draws that depend on a row's own key alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from pydantic import Field

from bertgpt_jax.config import Config
from bertgpt_jax.shapes import Array

_ONE = 0x3F800000
"""Bits of 1.0 in fp32; positive floats are ordered as their bits are."""


class Sampling(Config):
    """How the next token is chosen; applied in this order: penalty, temperature, top-k, top-p, min-p.

    Tokens of equal probability at a limit are all kept, whatever the limit.
    """

    temperature: float = Field(default=1.0, ge=0, description="0 takes the most probable token")
    top_k: int | None = Field(default=None, ge=1, description="only the k most probable (Fan et al. 2018)")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="only the smallest set with this much probability (Holtzman et al. 2020)"
    )
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="only those with this share of the best's probability (Nguyen et al. 2025)"
    )
    repetition_penalty: float = Field(
        default=1.0,
        gt=0,
        description="of tokens seen: divides positive logits, multiplies others (Keskar et al. 2019)",
    )

    @property
    def remembers(self) -> bool:
        """Whether choosing needs to know which tokens a row already has."""
        return self.repetition_penalty != 1.0


def adjust(logits_BV: Array, sampling: Sampling, seen_BV: Array | None = None) -> Array:
    """Logits of the distribution that is drawn from, fp32 [B, V]: -inf where a token is not allowed.

    Args:
        seen_BV: bool, tokens that the row already has; needed for a repetition penalty.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if sampling.remembers:
        penalty = sampling.repetition_penalty
        penalised = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalised, logits_BV)
    if sampling.temperature > 0:
        logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        logits_BV = _keep(logits_BV, jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:])
    if sampling.top_p < 1:
        logits_BV = jnp.where(_nucleus(jax.nn.softmax(logits_BV), sampling.top_p), logits_BV, -jnp.inf)
    if sampling.min_p > 0:
        logits_BV = _keep(logits_BV, jnp.max(logits_BV, -1, keepdims=True) + jnp.log(sampling.min_p))
    return logits_BV


def choose(logits_BV: Array, sampling: Sampling, keys_B: Array, seen_BV: Array | None = None) -> Array:
    """The next token of every row, int32 [B]; row b's depends on its own logits and key alone."""
    adjusted_BV = adjust(logits_BV, sampling, seen_BV)
    if sampling.temperature == 0:
        return jnp.argmax(adjusted_BV, -1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, adjusted_BV).astype(jnp.int32)


def row_keys(seed: int, numbers_B2: Array) -> Array:
    """A key a row from the row's two numbers (prompt, sample), whatever batch it is computed in."""
    key = jax.random.key(seed)
    return jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(numbers_B2)


def _keep(logits_BV: Array, least_B1: Array) -> Array:
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def _nucleus(probabilities_BV: Array, share: float) -> Array:
    """bool: the most probable tokens that together reach `share`.

    Bisects over the bits of the least probability that is kept: 31 sums instead of a sort, which takes ten times as
    long on a CPU for GPT-2's vocabulary.
    """

    def narrow(_: int, limits: tuple[Array, Array]) -> tuple[Array, Array]:
        enough, little = limits  # bits at which the tokens kept reach the share, and at which they do not
        middle = (enough + little) // 2
        kept = jnp.where(probabilities_BV >= _from_bits(middle), probabilities_BV, 0.0)
        reached = jnp.sum(kept, -1, keepdims=True) >= share
        return jnp.where(reached, middle, enough), jnp.where(reached, little, middle)

    rows = (probabilities_BV.shape[0], 1)
    limits = jnp.zeros(rows, jnp.int32), jnp.full(rows, _ONE + 1, jnp.int32)
    return probabilities_BV >= _from_bits(jax.lax.fori_loop(0, 31, narrow, limits)[0])


def _from_bits(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
