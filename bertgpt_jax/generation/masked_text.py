"""Text from a masked language model, and why it is no generator.

BERT is trained to guess masked tokens given all others. Nothing makes its guesses the conditionals of one distribution
over texts, so there is no such thing as sampling from it. Two ways to get text out of it all the same:

- unmasking: all tokens are masked; the guess the model is surest of is kept, and so on, a token at a time
  (the greedy end of mask-predict, Ghazvininejad et al. 2019);
- Gibbs sampling: one token at a time is masked and drawn anew given all others (Wang & Cho 2019; their erratum says
  that the chain is no sampler of a Markov random field, contrary to the paper).

`both_orders` shows the defect: a distribution gives a text one probability, in whatever order its tokens are multiplied
up. A masked model gives two.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bertgpt_jax.generation.masked import MaskedModel, masked_probabilities, padded
from bertgpt_jax.generation.sampling import Sampling, adjust
from bertgpt_jax.shapes import Array, Params


@dataclasses.dataclass(frozen=True)
class MaskedWriter:
    """Writes tokens at the free positions of a row of ids.

    Attributes:
        model, params: of the masked language model.
        sampling: how a token is chosen at a position.
        banned_V: bool, tokens that are never chosen (special ones).
        mask_id: of the vocabulary.
        seed: of all draws.
    """

    model: MaskedModel
    params: Params
    sampling: Sampling
    banned_V: np.ndarray
    mask_id: int
    seed: int = 0

    def unmask(self, ids: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Fills the masks at positions `free` one by one, first the one whose best token is most probable.

        Returns:
            the ids, and the positions in the order in which they were filled.
        """
        tokens_BT, lengths_B = padded([ids])
        key = jax.random.key(self.seed)
        tokens_BT, order_P = _unmask(
            self.model, self.sampling, self.params, tokens_BT, lengths_B, free, self.banned_V, key
        )
        return np.asarray(tokens_BT)[0, : len(ids)], np.asarray(order_P).tolist()

    def gibbs(self, ids: np.ndarray, free: np.ndarray, sweeps: int) -> np.ndarray:
        """Draws every free position anew given all others, `sweeps` times over, in a new random order each time."""
        tokens_BT, lengths_B = padded([ids])
        key, mask_id = jax.random.key(self.seed), np.int32(self.mask_id)
        tokens_BT = _gibbs(
            self.model, self.sampling, self.params, tokens_BT, lengths_B, free, self.banned_V, key, sweeps, mask_id
        )
        return np.asarray(tokens_BT)[0, : len(ids)]

    def both_orders(self, ids: np.ndarray, free: np.ndarray) -> tuple[float, float]:
        """log P of the free tokens by the chain rule, left to right and right to left; tokens to come are masked."""
        results = []
        for order in (free, free[::-1]):
            rows = np.repeat(ids[None], len(order), 0)
            for number in range(len(order)):
                rows[number, order[number:]] = self.mask_id
            probabilities = masked_probabilities(self.model, self.params, list(rows), order[:, None])
            chosen = probabilities[np.arange(len(order)), 0, ids[order]]
            results.append(float(np.log(chosen.astype(np.float64)).sum()))
        return results[0], results[1]


@partial(jax.jit, static_argnums=(0, 1))
def _unmask(
    model: MaskedModel,
    sampling: Sampling,
    params: Params,
    tokens_BT: Array,
    lengths_B: Array,
    free_P: Array,
    banned_V: Array,
    key: Array,
) -> tuple[Array, Array]:
    def fill(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tokens_BT, masked_P, order_P = carry
        logits_PV = model.logits(params, tokens_BT, lengths_B, free_P[None])[0]
        logits_PV = jnp.where(banned_V, -jnp.inf, logits_PV)
        sureness_P = jnp.max(jax.nn.log_softmax(logits_PV), -1)
        place = jnp.argmax(jnp.where(masked_P, sureness_P, -jnp.inf))
        token = _draw(logits_PV[place], sampling, jax.random.fold_in(key, number))
        return (
            tokens_BT.at[0, free_P[place]].set(token),
            masked_P.at[place].set(False),
            order_P.at[number].set(free_P[place]),
        )

    start = jnp.asarray(tokens_BT), jnp.ones(free_P.shape, bool), jnp.zeros(free_P.shape, jnp.int32)
    tokens_BT, _, order_P = jax.lax.fori_loop(0, len(free_P), fill, start)
    return tokens_BT, order_P


@partial(jax.jit, static_argnums=(0, 1))
def _gibbs(
    model: MaskedModel,
    sampling: Sampling,
    params: Params,
    tokens_BT: Array,
    lengths_B: Array,
    free_P: Array,
    banned_V: Array,
    key: Array,
    sweeps: Array,
    mask_id: Array,
) -> Array:
    def redraw(number: Array, tokens_BT: Array) -> Array:
        order_key, key_of_draw = jax.random.split(jax.random.fold_in(key, number // len(free_P)))
        place = jax.random.permutation(order_key, jnp.asarray(free_P))[number % len(free_P)]
        masked_BT = tokens_BT.at[0, place].set(mask_id)
        logits_V = model.logits(params, masked_BT, lengths_B, place[None, None])[0, 0]
        logits_V = jnp.where(banned_V, -jnp.inf, logits_V)
        token = _draw(logits_V, sampling, jax.random.fold_in(key_of_draw, number))
        return tokens_BT.at[0, place].set(token)

    return jax.lax.fori_loop(0, sweeps * len(free_P), redraw, jnp.asarray(tokens_BT))


def _draw(logits_V: Array, sampling: Sampling, key: Array) -> Array:
    adjusted_V = adjust(logits_V[None], sampling)[0]
    return jnp.argmax(adjusted_V) if sampling.temperature == 0 else jax.random.categorical(key, adjusted_V)
