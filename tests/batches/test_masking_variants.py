"""Runs of words, RoBERTa's and Megatron's rules, excluded ids, and what the settings refuse or warn of."""

from __future__ import annotations

import hashlib
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bertgpt_jax.batches import bits
from bertgpt_jax.batches.checks import warn_of_lost_predictions
from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.masking import BERT, MEGATRON, ROBERTA, Masking, lost_share, mask_rows, mask_tables
from bertgpt_jax.batches.pairs import SentencePairs
from bertgpt_jax.batches.windows import FullDocuments
from bertgpt_jax.config import Config, apply_overrides, build, identity, to_json
from bertgpt_jax.corpus.view import InMemoryCorpus
from bertgpt_jax.errors import ConfigError

VOCAB = 200
PAD, UNK, CLS, SEP, MASK, EOT = range(6)
SPECIAL = np.arange(VOCAB) < 6


def rows(count: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [CLS] words [SEP] words [SEP] [PAD]..., which are real, and word starts."""
    rng = np.random.default_rng(seed)
    size = rng.integers(5, length + 1, count)
    column = np.arange(length)
    tokens = rng.integers(6, VOCAB, (count, length)).astype(np.int32)
    tokens[:, 0] = CLS
    tokens[column == size[:, None] // 2] = SEP
    tokens[column == size[:, None] - 1] = SEP
    tokens[column >= size[:, None]] = PAD
    return tokens, column < size[:, None], rng.random(tokens.shape) < 0.6


def masked(masking: Masking, tokens, real, word_start=None, seed=0, epoch=0) -> dict[str, np.ndarray]:
    tables = mask_tables(masking, MASK, SPECIAL, UNK)
    return mask_rows(masking, tables, seed, epoch, np.arange(len(tokens)), tokens, real, word_start)


# ---------------------------------------------------------------- runs of words


def runs_one_by_one(tokens, start, order, draws, wanted: int, longest: int) -> set[int]:
    """The n-gram masking of ALBERT and Megatron for one row, in the order and with the lengths that are given."""
    words: list[list[int]] = []
    run_of: list[int] = []
    for i, token in enumerate(tokens):
        if SPECIAL[token]:
            continue
        behind = bool(words) and words[-1][-1] == i - 1
        if behind and not start[i]:
            words[-1].append(i)
        else:
            words.append([i])
            run_of.append(run_of[-1] if behind else i)
    chances = np.array([1 / n for n in range(1, longest + 1)])
    bounds = np.cumsum(chances / chances.sum())
    chosen: list[int] = []
    for w in sorted(range(len(words)), key=lambda w: order[words[w][0]]):
        if len(chosen) >= wanted:
            break
        n = 1 + int(np.searchsorted(bounds, draws[words[w][0]] / 2**32, "right"))
        ngram = [words[v] for v in range(w, min(w + n, len(words))) if run_of[v] == run_of[w]]
        while len(ngram) > 1 and len(chosen) + sum(map(len, ngram)) > wanted:
            ngram.pop()
        new = [i for word in ngram for i in word]
        if len(chosen) + len(new) <= wanted and not set(new) & set(chosen):
            chosen += new
    return set(chosen)


@given(st.integers(8, 90), st.floats(0.05, 0.6), st.integers(2, 10), st.booleans(), st.integers(0, 99))
def test_runs_are_those_of_the_loop(length, rate, longest, whole_word, seed):
    tokens, real, start = rows(8, length, seed)
    masking = Masking(rate=rate, spans=longest, whole_word=whole_word)
    out = masked(masking, tokens, real, start if whole_word else None, seed)
    order = bits.words(bits.stream(seed, "mask-choice", 0), np.arange(8), length)
    draws = bits.words(bits.stream(seed, "mask-span", 0), np.arange(8), length)
    for r in range(8):
        wanted = min(masking.predictions(length), max(1, int(round(rate * int(real[r].sum())))))
        starts = start[r] if whole_word else np.ones(length, bool)
        expected = runs_one_by_one(tokens[r], starts, order[r], draws[r], wanted, longest)
        assert set(out["mask_positions"][r][out["mask_weights"][r] > 0].tolist()) == expected


def test_lengths_of_runs_fall_as_one_over_n():
    """With rare masks few runs meet or are cut: their lengths have the drawn chances."""
    tokens = np.random.default_rng(0).integers(6, VOCAB, (4000, 512)).astype(np.int32)
    out = masked(Masking(rate=0.02, spans=4), tokens, np.ones(tokens.shape, bool))
    hit = np.zeros((4000, 514), bool)
    row, slot = np.nonzero(out["mask_weights"])
    hit[row, out["mask_positions"][row, slot] + 1] = True
    edges = np.diff(hit.astype(np.int8), axis=1)
    lengths = (np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]).astype(int)
    share = np.bincount(lengths, minlength=5)[1:5] / len(lengths)
    expected = np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12)
    # the last run of a row is shortened to fit, so shorter ones are somewhat more frequent
    assert np.abs(share - expected).max() < 0.07 and (np.diff(share) < 0).all()
    assert (hit.sum(1) == 10).all()


def test_one_word_runs_are_no_runs():
    tokens, real, start = rows(50, 64)
    for whole_word in (False, True):
        plain = masked(Masking(whole_word=whole_word), tokens, real, start)
        spans = masked(Masking(whole_word=whole_word, spans=1), tokens, real, start)
        for name, value in plain.items():
            np.testing.assert_array_equal(value, spans[name])


def test_rows_without_anything_to_predict():
    tokens = np.full((3, 16), PAD, np.int32)
    tokens[0, :2], tokens[1, :3] = (CLS, SEP), (CLS, 9, SEP)
    out = masked(Masking(spans=3, whole_word=True), tokens, tokens != PAD, np.zeros(tokens.shape, bool))
    assert out["mask_weights"].sum(1).tolist() == [0, 1, 0] and out["mask_positions"][1, 0] == 1
    empty = masked(Masking(spans=3), tokens[:0], tokens[:0] != PAD)
    assert empty["mask_positions"].shape == (0, 3)


# ---------------------------------------------------------------- RoBERTa, Megatron, BERT


def test_robertas_number_is_rounded_at_random():
    """int(rate * size + U): between the two whole numbers, on average rate * size."""
    size = 41
    tokens = np.full((6000, 48), PAD, np.int32)
    tokens[:, :size] = np.random.default_rng(0).integers(6, VOCAB, (6000, size))
    count = masked(ROBERTA, tokens, tokens != PAD)["mask_weights"].sum(1)
    assert set(count.tolist()) == {6, 7}  # 0.15 * 41 = 6.15
    assert abs(count.mean() - 6.15) < 4 * np.sqrt(0.15 * 0.85 / 6000)
    again = masked(ROBERTA, tokens, tokens != PAD, epoch=1)["mask_weights"].sum(1)
    assert (again != count).any()
    short = masked(ROBERTA, tokens[:, :8], np.arange(8) < np.full((6000, 1), 2))["mask_weights"].sum(1)
    assert set(short.tolist()) == {0, 1} and abs(short.mean() - 0.3) < 0.03
    assert all(n <= ROBERTA.predictions(t) for t in (20, 128, 512) for n in [int(0.15 * t + 1 - 2**-32)])


def test_variants_are_what_their_sources_say():
    assert BERT == Masking(random_from="all", predict_unknown=True) and BERT.rate == 0.15
    assert (ROBERTA.number, ROBERTA.random_from, ROBERTA.whole_word) == ("stochastic", "regular", False)
    assert (MEGATRON.whole_word, MEGATRON.spans, MEGATRON.random_from) == (True, 3, "all")
    for variant in (BERT, ROBERTA, MEGATRON):
        assert (variant.rate, variant.mask_fraction, variant.random_fraction) == (0.15, 0.8, 0.1)


class Holder(Config):
    masking: Masking = Masking()


@pytest.mark.parametrize("name, variant", [("bert", BERT), ("roberta", ROBERTA), ("megatron", MEGATRON)])
def test_a_variant_by_name(name, variant):
    assert apply_overrides(Holder(), [f"masking={name}"]).masking == variant
    assert build(Holder, {"masking": name}, "test").masking == variant
    assert Holder.model_validate_json(to_json(Holder(masking=variant))).masking == variant


def test_an_unknown_variant_is_named():
    with pytest.raises(ConfigError, match="masking = 'robert'.*known: bert, roberta, megatron"):
        apply_overrides(Holder(), ["masking=robert"])


def test_older_identities_stay():
    """What was trained before there were runs and variants is still the same thing."""
    fields = {"rate", "max_predictions", "mask_fraction", "random_fraction", "whole_word", "random_from"}
    assert identity(Masking()).keys() == fields
    assert identity(MEGATRON).keys() == fields | {"spans", "predict_unknown"}


PINNED = {"roberta": "79da2a8c6486bb99", "megatron": "6cd1337cb61d522f", "order": "7d98c73d05c50c70"}


@pytest.mark.parametrize("kind", PINNED)
def test_batches_stay_what_they_are(kind):
    """If this must change, `FORMAT` of batches/examples.py gets a new number."""
    examples = SentencePairs(task="sentence_order") if kind == "order" else FullDocuments()
    masking = {"roberta": ROBERTA, "megatron": MEGATRON, "order": BERT}[kind]
    documents = [[[(97 * d + 31 * s + 7 * t) % 487 + 6 for t in range(4 + s % 9)] for s in range(9)] for d in range(60)]
    flags = [[token % 3 > 0 for sentence in document for token in sentence] for document in documents]
    corpus = InMemoryCorpus(documents, 500, shards=2, word_starts=flags)
    batch = Dataset(corpus, examples, masking, sequence_length=32, batch_size=16, seed=3).batch(2)
    content = b"".join(name.encode() + batch[name].tobytes() for name in sorted(batch))
    assert hashlib.sha256(content).hexdigest()[:16] == PINNED[kind]


# ---------------------------------------------------------------- excluded ids


def test_excluded_ids_are_never_predicted_nor_drawn():
    tokens, real, start = rows(400, 64)
    out_of_reach = (7, 8, 150)
    for more in ({}, {"whole_word": True}, {"spans": 3}):
        masking = Masking(rate=0.6, exclude=out_of_reach, random_fraction=1, mask_fraction=0, **more)
        out = masked(masking, tokens, real, start)
        labels = out["mask_labels"][out["mask_weights"] > 0]
        seen = np.take_along_axis(out["tokens"], out["mask_positions"], axis=1)[out["mask_weights"] > 0]
        assert not np.isin(labels, out_of_reach).any() and not np.isin(seen, out_of_reach).any()
        assert np.isin(tokens, out_of_reach).any() and len(labels) > 1000
    everything = masked(Masking(exclude=(7,), random_from="all", random_fraction=1, mask_fraction=0), tokens, real)
    assert 7 in everything["tokens"] and 7 not in everything["mask_labels"]


def test_unknown_words_are_predicted_where_asked_for():
    tokens, real, _ = rows(400, 64)
    tokens[(tokens > 5) & (tokens % 3 == 0)] = UNK
    assert UNK not in masked(Masking(random_from="all"), tokens, real)["mask_labels"]
    out = masked(BERT, tokens, real)
    assert UNK in out["mask_labels"]
    regular = Masking(predict_unknown=True, random_fraction=1, mask_fraction=0)
    drawn = masked(regular, np.where(tokens == UNK, 9, tokens), real)
    assert UNK not in drawn["tokens"]
    assert UNK not in masked(Masking(predict_unknown=True, exclude=(UNK,)), tokens, real)["mask_labels"]


def test_a_dataset_knows_its_unknown_id():
    corpus = InMemoryCorpus([[[UNK] * 30, [UNK] * 30]] * 20, VOCAB)
    for masking, weight in ((BERT, True), (Masking(), False)):
        batch = Dataset(corpus, FullDocuments(), masking, sequence_length=32, batch_size=4).batch(0)
        assert bool(batch["mask_weights"].sum()) == weight


# ---------------------------------------------------------------- refusals and warnings


@pytest.mark.parametrize(
    "masking, size, message",
    [
        (Masking(exclude=(6, 7, 8, 9)), 10, "all 10 ids of the vocabulary are special or among the 4 of masking.exc"),
        (Masking(exclude=(6, 400)), 200, "masking.exclude: id 400 is outside the vocabulary of 200"),
        (Masking(), 6, "all 6 ids"),
    ],
)
def test_an_empty_mask_set_is_refused(masking, size, message):
    with pytest.raises(ConfigError, match=message):
        mask_tables(masking, MASK, np.arange(size) < 6, UNK)
    documents = [[[7] * 20, [7] * 20]] * 20 if size > 7 else [[[5] * 40]] * 20
    with pytest.raises(ConfigError, match=message):
        Dataset(InMemoryCorpus(documents, size), FullDocuments(), masking, sequence_length=32, batch_size=4)


@pytest.mark.parametrize("bad", [{"spans": 0}, {"spans": 11}, {"number": "up"}, {"exclude": (-1,)}])
def test_bad_settings_of_variants(bad):
    with pytest.raises(ValidationError) as error:
        Masking(**bad)
    assert next(iter(bad)) in str(error.value)


def test_whole_words_need_flags():
    tokens, real, _ = rows(4, 32)
    with pytest.raises(ConfigError, match="word-start flags"):
        masked(MEGATRON, tokens, real)


def test_a_small_maximum_is_warned_of_once(make_corpus, caplog):
    assert lost_share(Masking(max_predictions=20), 128) == 0  # BERT: round(0.15 * 128) = 19
    assert lost_share(Masking(max_predictions=77), 512) == lost_share(Masking(), 512) == lost_share(ROBERTA, 512) == 0
    assert lost_share(Masking(max_predictions=20), 512) == pytest.approx(1 - 20 / 77)
    warn_of_lost_predictions.cache_clear()
    masking = Masking(max_predictions=4, rate=0.25)
    with caplog.at_level(logging.WARNING):
        for split in ("train", "held_out", "train"):
            Dataset(
                make_corpus(60, held_out=9), SentencePairs(), masking, split=split, sequence_length=64, batch_size=4
            )
    assert len(caplog.messages) == 1
    for part in ("max_predictions = 4", "75%", "rate = 0.25", "16 of 64"):
        assert part in caplog.messages[0]
