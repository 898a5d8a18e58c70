"""Batches of pairs have the statistics of BERT's own instances, on the same documents, over as many passes.

Seeds are fixed, so a test gives the same p-values in every run. The rows of a document share its target length: what
is compared row by row is a thin sample of them, taken as independent; the rest is compared pass by pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from bertgpt_jax.batches.bert_exact import ExactSettings, exact_instances
from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.pair_counts import count_pairs
from bertgpt_jax.batches.pairs import SentencePairs
from bertgpt_jax.corpus.view import InMemoryCorpus

VOCAB, LENGTH, PASSES, THIN = 400, 128, 16, 4
SPELLINGS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[EOT]"]
SPELLINGS += [f"##{i}" if i % 4 == 0 else f"w{i}" for i in range(6, VOCAB)]
IDS = {token: i for i, token in enumerate(SPELLINGS)}
REJECTED = 1e-3
"""A p-value below this says that two samples differ."""


class Rows(NamedTuple):
    """What is compared: per row its pass, label, the tokens of A and of B and the masks; per mask place and fate."""

    number: np.ndarray
    random: np.ndarray
    first: np.ndarray
    second: np.ndarray
    masks: np.ndarray
    place: np.ndarray
    fate: np.ndarray
    drawn: np.ndarray


@functools.cache
def documents(mean: int) -> list[list[list[int]]]:
    """Log-normal numbers of sentences and lengths, as in recipes for Wikipedia; ids 6 and above."""
    rng = np.random.default_rng(mean)
    counts = np.maximum(rng.lognormal(np.log(mean) - 0.32, 0.8, 2400 // mean).astype(int), 1)
    sizes = [np.maximum(rng.lognormal(np.log(22), 0.5, n).astype(int), 1) for n in counts]
    return [[rng.integers(6, VOCAB, n).tolist() for n in row] for row in sizes]


def fates(seen: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """0 masked, 1 kept, 2 another token; and those other tokens."""
    fate = np.where(seen == IDS["[MASK]"], 0, np.where(seen == labels, 1, 2))
    return fate, seen[fate == 2]


@functools.cache
def original(mean: int, whole_word: bool) -> Rows:
    """BERT's script."""
    texts = [[[SPELLINGS[i] for i in sentence] for sentence in document] for document in documents(mean)]
    settings = {"max_seq_length": LENGTH, "dupe_factor": 1, "whole_word": whole_word}
    passes = [exact_instances(texts, SPELLINGS, ExactSettings(seed=seed, **settings)) for seed in range(PASSES)]
    found = [row for rows in passes for row in rows]
    second = np.array([sum(row.segment_ids) - 1 for row in found])
    size = np.array([len(row.tokens) for row in found])
    seen = np.array([IDS[row.tokens[p]] for row in found for p in row.masked_lm_positions])
    labels = np.array([IDS[label] for row in found for label in row.masked_lm_labels])
    place = np.array([p / len(row.tokens) for row in found for p in row.masked_lm_positions])
    number = np.repeat(np.arange(PASSES), [len(rows) for rows in passes])
    masks = np.array([len(row.masked_lm_positions) for row in found])
    random = np.array([row.is_random_next for row in found])
    return Rows(number, random, size - second - 3, second, masks, place, *fates(seen, labels))


def ours(mean: int, whole_word: bool, pairs: SentencePairs | None = None, **changes) -> Rows:
    """The rows of as many epochs of a dataset."""
    flags = [[i % 4 != 0 for sentence in document for i in sentence] for document in documents(mean)]
    corpus = InMemoryCorpus(documents(mean), VOCAB, word_starts=flags)
    settings = {"max_predictions": 20, "random_from": "all", "whole_word": whole_word, "predict_unknown": True}
    masking = Masking(**settings | changes)
    data = Dataset(corpus, pairs or SentencePairs(), masking, sequence_length=LENGTH, batch_size=64, seed=7)
    counts = [data.rows_per_epoch(epoch) for epoch in range(PASSES)]
    batches = [data.batch(n) for n in range(-(-sum(counts) // 64))]
    batch = {name: np.concatenate([b[name] for b in batches])[: sum(counts)] for name in batches[0]}
    size, second = batch["segments"].sum(1), batch["types"].sum(1) - 1
    row, slot = np.nonzero(batch["mask_weights"])
    position = batch["mask_positions"][row, slot]
    found = fates(batch["tokens"][row, position], batch["mask_labels"][row, slot])
    masks = batch["mask_weights"].sum(1).astype(int)
    number, random = np.repeat(np.arange(PASSES), counts), batch["next_labels"] > 0
    return Rows(number, random, size - second - 3, second, masks, position / size[row], *found)


def same_counts(a: np.ndarray, b: np.ndarray) -> float:
    """p-value of the chi-square test that two samples of whole numbers have the same chances; rare ones are joined."""
    values, total = np.unique(np.concatenate([a, b]), return_counts=True)
    often = values[total >= 20]
    table = np.array([[(x == v).sum() for v in often] + [(~np.isin(x, often)).sum()] for x in (a, b)])
    return float(stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue)


def same_distribution(a: np.ndarray, b: np.ndarray) -> float:
    """p-value of the Kolmogorov-Smirnov test of two samples."""
    return float(stats.ks_2samp(a, b).pvalue)


def same_means(a: Rows, b: Rows, value: Callable[[Rows], np.ndarray]) -> float:
    """p-value of Welch's t-test of a row's value, averaged over each pass."""
    means = [np.bincount(rows.number, weights=value(rows)) / np.bincount(rows.number) for rows in (a, b)]
    return float(stats.ttest_ind(*means, equal_var=False).pvalue)


def padding(rows: Rows) -> np.ndarray:
    return LENGTH - rows.first - rows.second - 3


def p_values(a: Rows, b: Rows) -> dict[str, float]:
    """Of every statistic."""
    thin = [np.random.default_rng(0).random(len(rows.random)) < 1 / THIN for rows in (a, b)]
    first, second, masks, pad = (
        [value[keep] for value, keep in zip(pair, thin, strict=True)]
        for pair in ((a.first, b.first), (a.second, b.second), (a.masks, b.masks), (padding(a), padding(b)))
    )
    counts = [np.bincount(rows.number) for rows in (a, b)]
    return {
        "rows of a pass": float(stats.ttest_ind(*counts, equal_var=False).pvalue),
        "random next": same_means(a, b, lambda rows: rows.random),
        "mean length of A": same_means(a, b, lambda rows: rows.first),
        "mean length of B": same_means(a, b, lambda rows: rows.second),
        "padding share": same_means(a, b, lambda rows: padding(rows) / LENGTH),
        "rows without padding": same_means(a, b, lambda rows: padding(rows) == 0),
        "length of A": same_distribution(*first),
        "length of B": same_distribution(*second),
        "padding": same_distribution(*pad),
        "masks of a row": same_counts(*masks),
        "places of masks": same_distribution(a.place[::THIN], b.place[::THIN]),
        "masked, kept, random": same_counts(a.fate, b.fate),
        "random tokens": same_counts(a.drawn // 8, b.drawn // 8),
    }


@pytest.mark.parametrize("mean, whole_word", [(8, False), pytest.param(25, True, marks=pytest.mark.slow)])
def test_pairs_and_masks_are_distributed_as_the_originals(mean, whole_word):
    theirs, found = original(mean, whole_word), ours(mean, whole_word)
    assert len(found.random) > 1500 and 0.5 < found.random.mean() < 0.65
    different = {name: p for name, p in p_values(theirs, found).items() if p < REJECTED}
    assert different == {}


@pytest.mark.parametrize(
    "changes, seen",
    [
        ({"pairs": SentencePairs(random_fraction=0.4)}, "random next"),
        pytest.param({"pairs": SentencePairs(short_fraction=0.2)}, "padding", marks=pytest.mark.slow),
        pytest.param({"pairs": SentencePairs(task="sentence_order")}, "rows of a pass", marks=pytest.mark.slow),
        pytest.param({"rate": 0.14}, "masks of a row", marks=pytest.mark.slow),
        ({"mask_fraction": 0.78, "random_fraction": 0.11}, "masked, kept, random"),
        pytest.param({"random_from": "regular"}, "random tokens", marks=pytest.mark.slow),
    ],
)
def test_a_deviation_would_be_seen(changes, seen):
    assert p_values(original(8, False), ours(8, False, **changes))[seen] < REJECTED


def test_the_counts_explain_the_rate():
    """More than half of the pairs are random: chunks of one sentence, and a fair coin for the others."""
    corpus = InMemoryCorpus(documents(8), VOCAB)
    counts = [count_pairs(corpus, SentencePairs(), "train", LENGTH, seed=7, epoch=e) for e in range(PASSES)]
    pairs, random, alone = np.sum(counts, axis=0)
    assert stats.binomtest(int(random - alone), int(pairs - alone), 0.5).pvalue > REJECTED
    assert counts[0].rate == counts[0].random / counts[0].pairs > 0.5 and alone > 0.1 * pairs
    theirs = original(8, False)
    rate = (alone + 0.5 * (pairs - alone)) / pairs
    assert stats.binomtest(int(theirs.random.sum()), len(theirs.random), float(rate)).pvalue > REJECTED
    whole = Dataset(corpus, SentencePairs(), Masking(), sequence_length=LENGTH, batch_size=8, seed=7)
    assert counts[2].pairs == whole.rows_per_epoch(2)
