"""Masks: how many, where, what stands there instead, and what they depend on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bertgpt_jax.batches import bits
from bertgpt_jax.batches.masking import Masking, mask_rows, mask_tables
from bertgpt_jax.errors import ConfigError

VOCAB = 200
PAD, UNK, CLS, SEP, MASK, EOT = range(6)
SPECIAL = np.arange(VOCAB) < 6


def rows(count: int, length: int, seed: int = 0, short: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] words [SEP] [PAD]... with lengths from 3 to `length`."""
    rng = np.random.default_rng(seed)
    size = rng.integers(3, length + 1, count) if short else np.full(count, length)
    column = np.arange(length)
    tokens = rng.integers(6, VOCAB, (count, length)).astype(np.int32)
    tokens[:, 0] = CLS
    tokens[column == size[:, None] - 1] = SEP
    tokens[column >= size[:, None]] = PAD
    return tokens, column < size[:, None]


def masked(masking: Masking, tokens, real, examples=None, seed=0, epoch=0, word_start=None) -> dict[str, np.ndarray]:
    examples = np.arange(len(tokens)) if examples is None else examples
    tables = mask_tables(masking, MASK, SPECIAL)
    return mask_rows(masking, tables, seed, epoch, examples, tokens, real, word_start)


@given(st.integers(8, 160), st.floats(0.01, 0.9), st.one_of(st.none(), st.integers(1, 40)), st.integers(0, 99))
def test_number_positions_and_labels(length, rate, most, seed):
    tokens, real = rows(12, length, seed)
    masking = Masking(rate=rate, max_predictions=most)
    out = masked(masking, tokens, real, seed=seed)
    width = masking.predictions(length)
    assert out["mask_positions"].shape == (12, width)
    for r in range(12):
        size = int(real[r].sum())
        # BERT: min(max_predictions, max(1, round(rate * tokens))), [CLS] and [SEP] counted; no more than there are
        wanted = min(width, max(1, int(round(rate * size))), size - 2)
        weights = out["mask_weights"][r]
        assert weights.tolist() == [1.0] * wanted + [0.0] * (width - wanted)
        positions = out["mask_positions"][r, :wanted]
        assert (np.diff(positions) > 0).all()
        labels = out["mask_labels"][r]
        assert labels[:wanted].tolist() == tokens[r, positions].tolist()
        assert not SPECIAL[labels[:wanted]].any()
        assert not out["mask_positions"][r, wanted:].any() and not labels[wanted:].any()
        untouched = np.ones(length, bool)
        untouched[positions] = False
        assert (out["tokens"][r] == tokens[r])[untouched].all()


def test_width_is_the_ceiling_of_the_rate():
    assert [Masking().predictions(n) for n in (128, 512, 20, 8)] == [20, 77, 3, 2]
    assert Masking(max_predictions=20).predictions(512) == 20
    assert Masking(rate=0.5, max_predictions=99).predictions(10) == 10


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_mask_depends_on_seed_epoch_and_example_alone(whole_word):
    tokens, real = rows(40, 64)
    word_start = np.random.default_rng(1).random(tokens.shape) < 0.6
    masking = Masking(whole_word=whole_word)
    all_rows = masked(masking, tokens, real, word_start=word_start)
    some = np.array([31, 2, 17])
    part = masked(masking, tokens[some], real[some], some, word_start=word_start[some])
    for name, value in part.items():
        np.testing.assert_array_equal(value, all_rows[name][some])
    for changed in ({"seed": 1}, {"epoch": 1}, {"examples": np.arange(40) + 1}):
        other = masked(masking, tokens, real, word_start=word_start, **changed)
        assert (other["mask_positions"] != all_rows["mask_positions"]).any(axis=1).mean() > 0.8


def test_positions_are_uniform():
    tokens, real = rows(6000, 42, short=False)
    out = masked(Masking(), tokens, real)
    counts = np.bincount(out["mask_positions"][out["mask_weights"] > 0], minlength=42)
    assert counts[0] == counts[41] == 0
    expected = 6000 * 6 / 40
    chi_square = ((counts[1:41] - expected) ** 2 / expected).sum()
    assert chi_square < 74  # 39 degrees of freedom: exceeded less than once in 1,000


@pytest.mark.parametrize("random_from, low", [("regular", 6), ("all", 0)])
def test_eighty_ten_ten(random_from, low):
    tokens, real = rows(8000, 64, short=False)
    out = masked(Masking(random_from=random_from), tokens, real)
    predicted = out["mask_weights"] > 0
    seen = np.take_along_axis(out["tokens"], out["mask_positions"], axis=1)[predicted]
    labels = out["mask_labels"][predicted]
    share = [(seen == MASK).mean(), (seen == labels).mean(), ((seen != MASK) & (seen != labels)).mean()]
    np.testing.assert_allclose(share, [0.8, 0.1, 0.1], atol=0.006)  # 80,000 draws: four standard errors
    drawn = seen[(seen != MASK) & (seen != labels)]
    assert drawn.min() == low and drawn.max() == VOCAB - 1
    counts = np.bincount(drawn, minlength=VOCAB)[6:]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 260  # 193 degrees of freedom, once in 1,000


def test_split_of_actions_follows_the_config():
    tokens, real = rows(50, 32)
    everything = masked(Masking(mask_fraction=1, random_fraction=0), tokens, real)
    seen = np.take_along_axis(everything["tokens"], everything["mask_positions"], axis=1)
    assert (seen[everything["mask_weights"] > 0] == MASK).all()
    nothing = masked(Masking(mask_fraction=0, random_fraction=0), tokens, real)
    np.testing.assert_array_equal(nothing["tokens"], tokens)
    assert nothing["mask_weights"].sum() > 0


def bert_whole_words(tokens, start, keys, wanted) -> set[int]:
    """`create_masked_lm_predictions` of google-research/bert with do_whole_word_mask, in the order that `keys` give."""
    groups: list[list[int]] = []
    for i, token in enumerate(tokens):
        if SPECIAL[token]:
            continue
        if groups and not start[i] and groups[-1][-1] == i - 1:
            groups[-1].append(i)
        else:
            groups.append([i])
    chosen: list[int] = []
    for group in sorted(groups, key=lambda g: keys[g[0]]):
        if len(chosen) >= wanted:
            break
        if len(chosen) + len(group) <= wanted:
            chosen += group
    return set(chosen)


@given(st.integers(8, 90), st.floats(0.05, 0.6), st.integers(0, 99))
def test_whole_words_as_bert(length, rate, seed):
    tokens, real = rows(10, length, seed)
    rng = np.random.default_rng(seed)
    tokens[:, length // 2] = np.where(real[:, length // 2], SEP, PAD)
    start = rng.random(tokens.shape) < 0.5
    masking = Masking(rate=rate, whole_word=True)
    out = masked(masking, tokens, real, seed=seed, word_start=start)
    keys = bits.words(bits.stream(seed, "mask-choice", 0), np.arange(10), length)
    for r in range(10):
        wanted = min(masking.predictions(length), max(1, int(round(rate * int(real[r].sum())))))
        expected = bert_whole_words(tokens[r], start[r], keys[r], wanted)
        assert set(out["mask_positions"][r][out["mask_weights"][r] > 0].tolist()) == expected


def test_actions_are_drawn_token_by_token_within_a_word():
    tokens, real = rows(4000, 40, short=False)
    start = np.zeros(tokens.shape, bool)
    start[:, 1::2] = True
    out = masked(Masking(rate=0.3, whole_word=True), tokens, real, word_start=start)
    pairs = out["mask_positions"].reshape(-1, 2)
    assert (pairs[:, 1] == pairs[:, 0] + 1).all()
    hidden = (np.take_along_axis(out["tokens"], out["mask_positions"], axis=1) == MASK).reshape(-1, 2)
    assert abs((hidden[:, 0] != hidden[:, 1]).mean() - 2 * 0.8 * 0.2) < 0.01


def test_a_row_without_anything_to_predict_has_no_weight():
    tokens = np.full((2, 16), PAD, np.int32)
    tokens[0, :2] = CLS, SEP
    for whole_word in (False, True):
        masking = Masking(whole_word=whole_word)
        out = masked(masking, tokens, tokens != PAD, word_start=np.ones(tokens.shape, bool))
        assert out["mask_weights"].sum() == 0
        np.testing.assert_array_equal(out["tokens"], tokens)


@pytest.mark.parametrize(
    "bad",
    [
        {"rate": 0.0},
        {"rate": 1.0},
        {"rate": float("nan")},
        {"max_predictions": 0},
        {"mask_fraction": 0.8, "random_fraction": 0.3},
        {"mask_fraction": -0.1},
        {"random_from": "every"},
    ],
)
def test_bad_settings(bad):
    name, value = list(bad.items())[-1]
    with pytest.raises(ValidationError) as error:
        Masking(**bad)
    assert name in str(error.value) and str(value) in str(error.value)


def test_nothing_left_to_mask():
    with pytest.raises(ConfigError, match="all 4 ids"):
        mask_tables(Masking(), 3, np.ones(4, bool))
