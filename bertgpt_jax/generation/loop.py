"""The compiled part of a continuation: the state between two tokens, the first token, and a loop over the others."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bertgpt_jax.generation.decode import Decoder
from bertgpt_jax.generation.sampling import Sampling, choose
from bertgpt_jax.shapes import Array, PyTree


class State(NamedTuple):
    """Between two calls of the loop.

    Attributes:
        tokens_B: the last token of each row, not yet read by the model.
        keys_B: a random key a row; the token with number n is drawn with the key folded with n.
        seen_BV: bool, tokens each row has, for the repetition penalty; None without one.
        done_B: bool, the row has drawn a stop token.
        number: int32 [], tokens drawn so far.
    """

    tokens_B: Array
    cache: PyTree
    keys_B: Array
    seen_BV: Array | None
    done_B: Array
    number: Array


@partial(jax.jit, static_argnums=(0, 1, 2))
def begin(
    decoder: Decoder,
    sampling: Sampling,
    slots: int,
    params: PyTree,
    tokens_BT: Array,
    starts_B: Array,
    keys_B: Array,
    seen_BV: Array | None,
    number: Array,
    stop_ids: Array,
) -> State:
    """Reads the prompts (see `Decoder.prefill`) and draws the first token of every row.

    Args:
        seen_BV: tokens each row has; None without a repetition penalty.
        number: tokens drawn before; draws depend on it.
        stop_ids: int32 [n], tokens that end a row.
    """
    logits_BV, cache = decoder.prefill(params, tokens_BT, starts_B, slots)
    state = State(starts_B, cache, keys_B, seen_BV, jnp.zeros(starts_B.shape, bool), number)
    return _drawn(state, logits_BV, cache, sampling, stop_ids)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def advance(
    decoder: Decoder,
    sampling: Sampling,
    limit: int,
    params: PyTree,
    state: State,
    count: Array,
    stop_ids: Array,
) -> tuple[State, Array]:
    """`count` (at most `limit`) tokens of every row, fewer once all rows are done: (state, tokens [B, limit])."""
    begun, rows = state.number, state.tokens_B.shape[0]

    def unfinished(carry: tuple[State, Array]) -> Array:
        return (carry[0].number - begun < count) & ~jnp.all(carry[0].done_B)

    def one(carry: tuple[State, Array]) -> tuple[State, Array]:
        state, tokens_BN = carry
        logits_BV, cache = decoder.step(params, state.tokens_B, _with_rows(state.cache, rows))
        after = _drawn(state, logits_BV, _without_one_row(cache, rows), sampling, stop_ids)
        column = state.number - begun
        return after, jax.lax.dynamic_update_slice(tokens_BN, after.tokens_B[:, None], (0, column))

    state = state._replace(cache=_without_one_row(state.cache, rows))
    state, tokens_BN = jax.lax.while_loop(unfinished, one, (state, jnp.zeros((rows, limit), jnp.int32)))
    return state._replace(cache=_with_rows(state.cache, rows)), tokens_BN


def _without_one_row(cache: PyTree, rows: int) -> PyTree:
    """The cache of a single row without the row dimension.

    XLA drops that dimension from the attention products; carried through the loop with it, the cache is written twice,
    once in each shape, and copied for it in every step.
    """
    return jax.tree.map(lambda leaf: leaf[0] if leaf.ndim > 1 else leaf, cache) if rows == 1 else cache


def _with_rows(cache: PyTree, rows: int) -> PyTree:
    """The inverse of `_without_one_row`."""
    return jax.tree.map(lambda leaf: leaf[None] if leaf.ndim > 1 else leaf, cache) if rows == 1 else cache


def _drawn(state: State, logits_BV: Array, cache: PyTree, sampling: Sampling, stop_ids: Array) -> State:
    """The state after drawing from `logits_BV`."""
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.number)
    tokens_B = choose(logits_BV, sampling, keys_B, state.seen_BV)
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(tokens_B)), tokens_B].set(True)
    done_B = state.done_B | jnp.any(tokens_B[:, None] == stop_ids[None], -1)
    return State(tokens_B, cache, state.keys_B, seen_BV, done_B, state.number + 1)
