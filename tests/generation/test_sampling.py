"""Filters of the distribution against plain NumPy, and draws against the distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgpt_jax.config import build
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.generation.sampling import Sampling, adjust, choose, row_keys

V = 50


def distribution(logits: np.ndarray, **fields) -> np.ndarray:
    return np.asarray(jax.nn.softmax(adjust(jnp.asarray(logits, jnp.float32), Sampling(**fields))))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, V)) * 2


def test_temperature(logits) -> None:
    np.testing.assert_allclose(distribution(logits, temperature=0.7), softmax(logits / 0.7), atol=1e-6)


@pytest.mark.parametrize("k", [1, 7, V, V + 9])
def test_top_k(logits, k: int) -> None:
    found = distribution(logits, top_k=k)
    for row, p in zip(logits, found, strict=True):
        best = np.argsort(-row)[:k]
        assert set(np.flatnonzero(p)) == set(best)
        np.testing.assert_allclose(p[best], softmax(row[best]), atol=1e-6)


@settings(max_examples=30)
@given(st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_top_p_keeps_the_smallest_set_that_reaches_it(p: float, seed: int) -> None:
    row = np.random.default_rng(seed).standard_normal((1, V)).astype(np.float32) * 3
    kept = distribution(row, top_p=p)[0] > 0
    order = np.argsort(-row[0])
    total = np.cumsum(softmax(row.astype(np.float64))[0][order])
    count = int(np.sum(kept))
    assert set(order[:count]) == set(np.flatnonzero(kept)), "the most probable ones"
    assert total[count - 1] >= p - 1e-5 and (count == 1 or total[count - 2] < p + 1e-5)


def test_equal_tokens_are_kept_together() -> None:
    row = np.log([[0.4, 0.2, 0.2, 0.2]])
    assert np.count_nonzero(distribution(row, top_p=0.5)) == 4
    assert np.count_nonzero(distribution(row, top_k=2)) == 4


def test_min_p(logits) -> None:
    p = softmax(logits)
    np.testing.assert_array_equal(distribution(logits, min_p=0.1) > 0, p >= 0.1 * p.max(-1, keepdims=True))


def test_repetition_penalty() -> None:
    seen = jnp.array([[True, True, False, False]])
    found = adjust(jnp.array([[2.0, -2.0, 2.0, -2.0]]), Sampling(repetition_penalty=4.0), seen)
    np.testing.assert_allclose(found, [[0.5, -8.0, 2.0, -2.0]])


def test_greedy_takes_the_best(logits) -> None:
    keys = row_keys(0, np.zeros((4, 2), np.uint32))
    assert choose(jnp.asarray(logits), Sampling(temperature=0), keys).tolist() == logits.argmax(-1).tolist()


def test_frequencies_are_the_models_probabilities() -> None:
    """Chi-square of 40,000 draws, of whole distributions and of filtered ones (seeded: the same draws in every run)."""
    from scipy.stats import chi2

    row, draws = np.random.default_rng(3).standard_normal(12), 40_000
    draw = jax.jit(choose, static_argnums=1)
    for number, fields in enumerate(({}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8})):
        keys = row_keys(number, np.stack([np.arange(draws), np.zeros(draws)], 1).astype(np.uint32))
        tokens = draw(jnp.tile(row, (draws, 1)), Sampling(**fields), keys)
        expected = distribution(row[None], **fields)[0] * draws
        counts = np.bincount(tokens, minlength=12)
        possible = expected > 0
        assert counts[~possible].sum() == 0
        statistic = np.sum((counts - expected)[possible] ** 2 / expected[possible])
        assert chi2.sf(statistic, possible.sum() - 1) > 0.001, fields
        shifted = np.roll(expected[possible], 1)
        assert chi2.sf(np.sum((counts[possible] - shifted) ** 2 / shifted), possible.sum() - 1) < 1e-9, "it could fail"


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}, {"repetition_penalty": 0}]
)
def test_bad_settings_are_named(bad: dict) -> None:
    (name, value), *_ = bad.items()
    with pytest.raises(ConfigError, match=rf"{name} = {value}"):
        build(Sampling, bad, "options")
