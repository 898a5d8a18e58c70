"""Beam search against brute force."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.errors import UsageError
from bertgpt_jax.generation.beam import length_penalty, search
from bertgpt_jax.generation.continuation import Continuation
from bertgpt_jax.generation.decode import GptDecoder
from bertgpt_jax.generation.sampling import Sampling
from bertgpt_jax.models.gpt import GptConfig

LONGEST = 3


def brute_force(log_p, vocabulary: int, stop: int | None, alpha: float) -> list[tuple[tuple[int, ...], float]]:
    """Every continuation of up to LONGEST tokens with its score, best first; `log_p(tokens)` is of the next token."""
    found = []
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(vocabulary), repeat=length):
            ends = tokens[-1] == stop
            if (stop in tokens[:-1]) or (not ends and length < LONGEST):
                continue
            total = sum(log_p(tokens[:i])[tokens[i]] for i in range(length))
            found.append((tokens, total / ((5 + length) / 6) ** alpha))
    return sorted(found, key=lambda row: -row[1])


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
@pytest.mark.parametrize("stop", [None, 4])
def test_with_all_beams_it_is_brute_force(tiny, alpha: float, stop: int | None) -> None:
    """A real model, two prompts of different lengths, beams for every continuation."""
    config = GptConfig(
        num_layers=1, hidden_size=12, num_heads=2, intermediate_size=16, vocab_size=5, max_positions=8
    )  # fmt: skip
    model = tiny(config)
    decoder = GptDecoder(config, 5)
    prompts = [[2, 0, 1], [3]]
    stops = () if stop is None else (stop,)
    found = search(decoder, decoder.layout(model.params), prompts, 125, LONGEST, alpha, stops)
    for prompt, beams in zip(prompts, found, strict=True):
        rows = list(itertools.product(range(5), repeat=LONGEST - 1))
        logits = model.forward([(*prompt, *tokens) for tokens in rows])[:, len(prompt) - 1 :].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        known = {tokens[:n]: p[n] for tokens, p in zip(rows, log_p, strict=True) for n in range(LONGEST)}
        expected = brute_force(known.__getitem__, 5, stop, alpha)
        assert len(beams) == min(len(expected), 125)
        np.testing.assert_allclose([score for _, score in beams], [score for _, score in expected], atol=1e-5)
        assert [tuple(tokens) for tokens, _ in beams[:5]] == [tokens for tokens, _ in expected[:5]]


def test_few_beams_against_a_search_by_hand(table_decoder) -> None:
    """Three beams of a table where pruning loses something: the same hypotheses as step by step in Python."""
    rng = np.random.default_rng(5)
    table = np.log(rng.dirichlet(np.ones(6), 6))
    beams, alpha, stop, longest = 3, 0.6, 5, 6
    alive, ended = [((), 0.0)], []
    for length in range(1, longest + 1):
        grown = [((*t, v), p + table[t[-1] if t else 0, v]) for t, p in alive for v in range(6)]
        grown = sorted(grown, key=lambda row: -row[1])[: 2 * beams]
        penalty = ((5 + length) / 6) ** alpha
        ended += [(t, p / penalty) for t, p in grown if t[-1] == stop or length == longest]
        ended = sorted(ended, key=lambda row: -row[1])[:beams]
        alive = [(t, p) for t, p in grown if t[-1] != stop][:beams]
    found = search(table_decoder(6), jnp.asarray(table, jnp.float32), [[1, 0]], beams, longest, alpha, (stop,))[0]
    assert [tuple(tokens) for tokens, _ in found] == [tokens for tokens, _ in ended]
    np.testing.assert_allclose([score for _, score in found], [score for _, score in ended], atol=1e-5)


def test_one_beam_is_greedy(gpt) -> None:
    decoder = GptDecoder(gpt.config, 19)
    params = decoder.layout(gpt.params)
    greedy = Continuation(decoder, params, Sampling(temperature=0), 9).run([[3, 1, 4], [1, 5]])
    assert [found[0][0] for found in search(decoder, params, [[3, 1, 4], [1, 5]], 1, 9)] == greedy


def test_the_length_penalty_is_gnmts() -> None:
    assert length_penalty(1, 0.6) == 1.0 and length_penalty(7, 0.0) == 1.0
    assert float(length_penalty(19, 0.5)) == pytest.approx(2.0)


def test_longer_than_the_context(gpt) -> None:
    decoder = GptDecoder(gpt.config, 19)
    with pytest.raises(UsageError, match="prompt 1 has 22 tokens, with 4 new ones"):
        search(decoder, None, [[1] * 22], 2, 4)
