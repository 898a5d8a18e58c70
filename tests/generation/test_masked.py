"""Guesses for masks, and text written with them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bertgpt_jax.corpus.characters import Characters
from bertgpt_jax.errors import ConfigError, DataError, UsageError
from bertgpt_jax.generation.masked import MaskedModel, encode_masked, fill_masks, masked_probabilities
from bertgpt_jax.generation.masked_text import MaskedWriter
from bertgpt_jax.generation.sampling import Sampling

LETTERS = Characters("abcdefghij ")
CLS, SEP, MASK = LETTERS.special.cls, LETTERS.special.sep, LETTERS.special.mask
SIZE = LETTERS.vocab_size


@pytest.fixture(scope="module")
def model(bert) -> MaskedModel:
    return MaskedModel(bert.config, SIZE)


def direct(bert, ids: list[int], at: list[int]) -> np.ndarray:
    """Probabilities without padding or mask."""
    e = np.exp(bert.forward([ids])[0, at, :SIZE].astype(np.float64))
    return e / e.sum(-1, keepdims=True)


def test_probabilities_are_the_models(model, bert) -> None:
    """Rows of different lengths, rows of the table beyond the vocabulary left out."""
    rows = [[CLS, MASK, 7, SEP], [CLS, 6, MASK, 8, 9, 10, SEP]]
    found = masked_probabilities(model, bert.params, [np.array(r) for r in rows], [[1], [2]])
    assert found.shape == (2, 1, SIZE)
    for row, at, p in zip(rows, (1, 2), found, strict=True):
        np.testing.assert_allclose(p, direct(bert, row, [at]), atol=1e-5)


def test_several_masks_written_either_way(model, bert) -> None:
    guesses = fill_masks(model, bert.params, LETTERS, "ab[MASK]d<mask>", 3)
    ids, masks = encode_masked(LETTERS, "ab[MASK]d<mask>")
    assert ids.tolist() == [CLS, *LETTERS.encode("ab"), MASK, *LETTERS.encode("d"), MASK, SEP] and masks == [3, 5]
    for found, p in zip(guesses, direct(bert, ids.tolist(), masks), strict=True):
        assert [guess.id for guess in found] == np.argsort(-p)[:3].tolist()
        assert [guess.token for guess in found] == [LETTERS.token(guess.id) for guess in found]
        np.testing.assert_allclose([guess.probability for guess in found], np.sort(p)[::-1][:3], atol=1e-5)


def test_what_is_refused(model) -> None:
    with pytest.raises(UsageError, match=r"'abc' has no mask; write \[MASK\]"):
        encode_masked(LETTERS, "abc")
    with pytest.raises(DataError, match=r"no tokens for 'z'"):
        encode_masked(LETTERS, "z [MASK]")
    with pytest.raises(UsageError, match=r"the text has 72 tokens, more than the model's context of 64"):
        model.check_length(72)

    class NoMask(Characters):
        def __init__(self):
            super().__init__("ab")
            self.special = type(self.special)(cls=2, sep=3)

    with pytest.raises(ConfigError, match="filling masks needs .* no mask"):
        encode_masked(NoMask(), "a [MASK]")


def writer(model, bert, **settings) -> MaskedWriter:
    return MaskedWriter(model, bert.params, Sampling(**settings), LETTERS.special_mask(), MASK, seed=3)


IDS = np.array([CLS, 7, *[MASK] * 4, 8, SEP], np.int32)
FREE = np.arange(2, 6, dtype=np.int32)


def test_unmasking_takes_the_surest_guess_first(model, bert) -> None:
    found, order = writer(model, bert, temperature=0).unmask(IDS, FREE)
    ids, left = IDS.copy(), FREE.tolist()
    allowed = ~LETTERS.special_mask()
    for at in order:
        p = direct(bert, ids.tolist(), left) * allowed
        p = p / p.sum(-1, keepdims=True)
        assert left[int(p.max(-1).argmax())] == at
        ids[at] = p[left.index(at)].argmax()
        left.remove(at)
    assert found.tolist() == ids.tolist() and not left


def test_gibbs_draws_from_the_conditionals(model, bert) -> None:
    """One free position: every sweep is a draw from the model's guess given the rest."""
    from scipy.stats import chi2

    ids, free, draws = np.array([CLS, 7, MASK, 8, SEP], np.int32), np.array([2], np.int32), 400
    tokens = []
    params = jax.device_put(bert.params)
    for seed in range(draws):
        one = MaskedWriter(model, params, Sampling(), LETTERS.special_mask(), MASK, seed)
        tokens.append(int(one.gibbs(ids, free, 2)[2]))
    p = direct(bert, ids.tolist(), [2])[0] * ~LETTERS.special_mask()
    expected = p / p.sum() * draws
    counts = np.bincount(tokens, minlength=SIZE)
    assert counts[expected == 0].sum() == 0
    large = expected > 5
    statistic = np.sum((counts - expected)[large] ** 2 / expected[large])
    assert chi2.sf(statistic, large.sum() - 1) > 0.001


def test_gibbs_touches_free_positions_only_and_is_reproducible(model, bert) -> None:
    one, other = writer(model, bert), writer(model, bert)
    found = one.gibbs(IDS, FREE, 3)
    assert found.tolist() == other.gibbs(IDS, FREE, 3).tolist() != one.gibbs(IDS, FREE, 4).tolist()
    kept = np.delete(np.arange(len(IDS)), FREE)
    assert np.array_equal(found[kept], IDS[kept]) and not LETTERS.special_mask()[found[FREE]].any()


def test_both_orders_are_chain_rules_and_disagree(model, bert) -> None:
    ids = np.array([CLS, 7, 8, SEP], np.int32)
    forward, backward = writer(model, bert).both_orders(ids, np.array([1, 2], np.int32))
    first = np.log(direct(bert, [CLS, MASK, MASK, SEP], [1, 2]))
    second = np.log(direct(bert, [CLS, 7, MASK, SEP], [2])[0, 8]), np.log(direct(bert, [CLS, MASK, 8, SEP], [1])[0, 7])
    assert forward == pytest.approx(first[0, 7] + second[0], abs=1e-4)
    assert backward == pytest.approx(first[1, 8] + second[1], abs=1e-4)
    assert abs(forward - backward) > 1e-3, "no distribution over texts has both"
