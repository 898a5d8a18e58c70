"""Beam search with length normalisation (Wu et al. 2016, section 7; Vaswani et al. 2017 take 4 beams and alpha 0.6)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bertgpt_jax.generation.continuation import check_lengths, right_aligned, rounded
from bertgpt_jax.generation.decode import Decoder
from bertgpt_jax.shapes import Array, PyTree


class Beams(NamedTuple):
    """Hypotheses of B prompts, K each (K = beams, N = most new tokens).

    Attributes:
        alive_tokens_BKN, alive_BK: those that go on, and log P of each; -inf where there is none.
        ended_tokens_BKN, ended_BK, ended_lengths_BK: the best that ended: score log P / length penalty, number of
            tokens, the stop token included.
        logits_RV: of the next token; R = B * K rows.
        cache: of the same rows.
        length: int32 [], tokens of each hypothesis that goes on.
    """

    alive_tokens_BKN: Array
    alive_BK: Array
    ended_tokens_BKN: Array
    ended_BK: Array
    ended_lengths_BK: Array
    logits_RV: Array
    cache: PyTree
    length: Array


def length_penalty(length: Array | int, alpha: float) -> Array:
    """(5 + length)^alpha / 6^alpha (Wu et al. 2016, eq. 14); 1 for alpha 0: plain log-probability."""
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


def search(
    decoder: Decoder,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    beams: int,
    max_new: int,
    alpha: float = 0.6,
    stop_ids: tuple[int, ...] = (),
) -> list[list[tuple[list[int], float]]]:
    """`beam_search` of prompts of different lengths: the (tokens, score) of each one's best continuations, best first.

    Raises:
        UsageError: a prompt with its continuation is longer than the context.
    """
    check_lengths(prompts, max_new, decoder.max_positions)
    tokens_BT, starts_B = right_aligned(prompts)
    slots = tokens_BT.shape[1] + rounded(max_new)
    sizes = dict(slots=slots, beams=beams, max_new=max_new)
    found = beam_search(decoder, params, tokens_BT, starts_B, **sizes, alpha=alpha, stop_ids=stop_ids)
    return [
        [(ids[:n].tolist(), float(score)) for ids, n, score in zip(*row, strict=True) if score > -np.inf]
        for row in zip(*map(np.asarray, found), strict=True)
    ]


@partial(jax.jit, static_argnames=("decoder", "slots", "beams", "max_new", "stop_ids"))
def beam_search(
    decoder: Decoder,
    params: PyTree,
    tokens_BT: Array,
    starts_B: Array,
    *,
    slots: int,
    beams: int,
    max_new: int,
    alpha: float = 0.6,
    stop_ids: tuple[int, ...] = (),
) -> tuple[Array, Array, Array]:
    """The `beams` best continuations of each prompt, best first.

    A hypothesis ends with a stop token or with `max_new` tokens. The search ends when no hypothesis that goes on can
    still beat the worst that is kept: log P only falls, so its bound is log P / penalty(max_new), for alpha >= 0.

    Args:
        tokens_BT, starts_B, slots: as `Decoder.prefill` takes them; slots >= T + max_new.
        alpha: of the length penalty.

    Returns:
        tokens int32 [B, K, max_new]; lengths int32 [B, K], stop token included; scores fp32 [B, K], -inf where fewer
        than K continuations exist.
    """
    logits_BV, cache = decoder.prefill(params, tokens_BT, starts_B, slots)
    start = _first(logits_BV, cache, beams, max_new)

    def useful(state: Beams) -> Array:
        bound_B = state.alive_BK[:, 0] / length_penalty(max_new, alpha)
        return (state.length < max_new) & jnp.any(bound_B > state.ended_BK[:, -1])

    state = jax.lax.while_loop(useful, partial(_grow, decoder, params, alpha=alpha, stop_ids=stop_ids), start)
    complete_BK = jnp.where(state.length == max_new, state.alive_BK / length_penalty(max_new, alpha), -jnp.inf)
    full_BK = jnp.full_like(state.ended_lengths_BK, max_new)
    tokens, scores, lengths = _best(
        (state.ended_tokens_BKN, state.alive_tokens_BKN),
        (state.ended_BK, complete_BK),
        (state.ended_lengths_BK, full_BK),
    )
    return tokens, lengths, scores


def _first(logits_BV: Array, cache: PyTree, beams: int, max_new: int) -> Beams:
    """One hypothesis a prompt, without tokens; its K - 1 copies have probability 0."""
    rows = logits_BV.shape[0]
    none_BK = jnp.full((rows, beams), -jnp.inf)
    no_tokens_BKN = jnp.zeros((rows, beams, max_new), jnp.int32)
    same = jnp.repeat(jnp.arange(rows), beams)
    return Beams(
        no_tokens_BKN,
        none_BK.at[:, 0].set(0.0),
        no_tokens_BKN,
        none_BK,
        jnp.zeros((rows, beams), jnp.int32),
        logits_BV[same],
        _rows(cache, same),
        jnp.zeros((), jnp.int32),
    )


def _grow(decoder: Decoder, params: PyTree, state: Beams, *, alpha: float, stop_ids: tuple[int, ...]) -> Beams:
    """Every hypothesis one token longer: the best K that end are kept, and the best K that do not."""
    rows, beams, _ = state.alive_tokens_BKN.shape
    vocabulary = state.logits_RV.shape[-1]
    step_BKV = jax.nn.log_softmax(state.logits_RV).reshape(rows, beams, vocabulary)
    all_BM = (state.alive_BK[..., None] + step_BKV).reshape(rows, beams * vocabulary)
    # of the best (1 + stop tokens) * K at most stop tokens * K end, so K that go on are among them
    several = min((1 + len(stop_ids)) * beams, beams * vocabulary)
    log_BC, flat_BC = jax.lax.top_k(all_BM, several)
    parents_BC, token_BC = flat_BC // vocabulary, (flat_BC % vocabulary).astype(jnp.int32)
    tokens_BCN = jnp.take_along_axis(state.alive_tokens_BKN, parents_BC[..., None], 1)
    tokens_BCN = jax.lax.dynamic_update_slice_in_dim(tokens_BCN, token_BC[..., None], state.length, 2)
    length = state.length + 1
    ends_BC = jnp.any(token_BC[..., None] == jnp.array(stop_ids, jnp.int32), -1)

    lengths_BC = jnp.full(ends_BC.shape, length)
    score_BC = jnp.where(ends_BC, log_BC / length_penalty(length, alpha), -jnp.inf)
    ended_tokens, ended, ended_lengths = _best(
        (state.ended_tokens_BKN, tokens_BCN), (state.ended_BK, score_BC), (state.ended_lengths_BK, lengths_BC)
    )
    alive_BK, kept_BK = jax.lax.top_k(jnp.where(ends_BC, -jnp.inf, log_BC), beams)
    parents_BK, token_BK = (jnp.take_along_axis(x_BC, kept_BK, 1) for x_BC in (parents_BC, token_BC))
    origin_R = (jnp.arange(rows)[:, None] * beams + parents_BK).reshape(-1)
    logits_RV, cache = decoder.step(params, token_BK.reshape(-1), _rows(state.cache, origin_R))
    alive_tokens = jnp.take_along_axis(tokens_BCN, kept_BK[..., None], 1)
    return Beams(alive_tokens, alive_BK, ended_tokens, ended, ended_lengths, logits_RV, cache, length)


def _best(
    tokens: tuple[Array, Array], scores: tuple[Array, Array], lengths: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    """The best K (columns of the first) of two sets of hypotheses: tokens, scores, lengths."""
    both = jnp.concatenate(scores, 1)
    best_BK, at_BK = jax.lax.top_k(both, scores[0].shape[1])
    tokens_BKN = jnp.take_along_axis(jnp.concatenate(tokens, 1), at_BK[..., None], 1)
    return tokens_BKN, best_BK, jnp.take_along_axis(jnp.concatenate(lengths, 1), at_BK, 1)


def _rows(cache: PyTree, rows_R: Array) -> PyTree:
    """A cache with these rows of it; numbers without rows stay."""
    return jax.tree.map(lambda leaf: leaf[rows_R] if leaf.ndim else leaf, cache)
