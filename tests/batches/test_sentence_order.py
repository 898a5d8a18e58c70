"""Sentence order: two consecutive parts of a document, in the text's order or swapped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bertgpt_jax.batches import bits
from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.packing import PackedPairs
from bertgpt_jax.batches.pair_counts import count_pairs
from bertgpt_jax.batches.pairs import SentencePairs, plan_pairs, read_sentences
from bertgpt_jax.config import identity
from bertgpt_jax.corpus.view import InMemoryCorpus
from bertgpt_jax.errors import DataError

ORDER = SentencePairs(task="sentence_order")


def sentences_of(lengths: list[list[int]]):
    corpus = InMemoryCorpus([[[7] * n for n in document] for document in lengths], 10)
    return read_sentences(corpus, 0, 0, len(lengths))


def pairs_of_document(lengths: list[int], number: int, config, room: int, seed: int, epoch: int) -> list:
    """(first sentence of A, of B, behind the chunk; swapped) of each pair, gathered sentence by sentence."""
    key = bits.stream(seed, "pair-target", epoch)
    coin, draw = bits.words(key, np.array([number]), 2)[0].tolist()
    target = 2 + draw * (room - 1) // 2**32 if coin < round(config.short_fraction * 2**32) else room
    pairs, chunk = [], []
    for i in range(len(lengths)):
        chunk.append(i)
        left = len(lengths) - 1 - i
        full = sum(lengths[s] for s in chunk) >= target and len(chunk) > 1 and left != 1
        if (full or not left) and len(chunk) > 1:
            words = bits.words(bits.stream(seed, "pair", epoch), np.array([number]), 4, sub=chunk[0])[0].tolist()
            middle = chunk[0] + 1 + words[0] * (len(chunk) - 1) // 2**32
            pairs.append((chunk[0], middle, i + 1, words[1] < round(config.random_fraction * 2**32)))
            chunk = []
    return pairs


documents = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=15), min_size=1, max_size=8)


@given(documents, st.sampled_from([0, 0.1, 1]), st.floats(0, 1), st.integers(16, 90), st.integers(0, 9))
def test_pairs_are_those_of_the_loop(lengths, short, random_fraction, length, seed):
    config = SentencePairs(task="sentence_order", short_fraction=short, random_fraction=random_fraction)
    sentences = sentences_of(lengths)
    plan = plan_pairs(config, sentences, length, seed, 0)
    r = 0
    for d, document in enumerate(lengths):
        for a, b, stop, swapped in pairs_of_document(document, int(sentences.number[d]), config, length - 3, seed, 0):
            assert bool(plan.random[r]) == swapped
            spans = [(a, b), (b, stop)]
            for side, (lo, hi) in enumerate(spans[::-1] if swapped else spans):
                begin, size = sentences.start[sentences.first[d] + lo], sum(document[lo:hi])
                assert begin <= plan.start[r, side] and plan.length[r, side] >= 1
                assert plan.start[r, side] + plan.length[r, side] <= begin + size
                if sum(document[a:stop]) <= length - 3:  # nothing is truncated
                    assert plan.length[r, side] == size
            assert plan.length[r].sum() == min(length - 3, sum(document[a:stop]))
            r += 1
    assert len(plan) == r and plan.alone == 0
    assert plan.tally == sum(len(document) > 1 for document in lengths)


@given(documents, st.integers(0, 9))
def test_every_sentence_of_a_longer_document_is_used_once(lengths, seed):
    one_token = [[1] * len(document) for document in lengths]
    sentences = sentences_of(one_token)
    plan = plan_pairs(SentencePairs(task="sentence_order", short_fraction=0.5), sentences, 30, seed, 0)
    used = [t for s, n in zip(plan.start.ravel(), plan.length.ravel(), strict=True) for t in range(s, s + n)]
    longer = [d for d, document in enumerate(lengths) if len(document) > 1]
    expected = [s for d in longer for s in sentences.start[sentences.first[d] : sentences.first[d + 1]].tolist()]
    assert sorted(used) == expected


@pytest.mark.parametrize("examples", [ORDER, PackedPairs(task="sentence_order", max_segments=4)])
def test_labels_say_the_order_of_the_text(examples):
    """Tokens that count upwards through the text show which part came first."""
    documents = [[[6 + 10 * s + t for t in range(9)] for s in range(40)] for _ in range(30)]
    masking = Masking(mask_fraction=0, random_fraction=0)
    data = Dataset(InMemoryCorpus(documents, 500), examples, masking, sequence_length=48, batch_size=32, seed=1)
    swapped = []
    for n in range(3):
        batch = data.batch(n)
        a, b = batch["tokens"][:, 1], batch["tokens"][np.arange(32), batch["types"].argmax(1)]
        label = batch["next_labels"].reshape(32, -1)[:, 0]
        np.testing.assert_array_equal(a > b, label == 1)
        swapped += label.tolist()
    assert 0.3 < np.mean(swapped) < 0.7


def test_half_are_swapped(make_corpus):
    counts = count_pairs(make_corpus(600), ORDER, "train", 64)
    assert abs(counts.rate - 0.5) < 4 * 0.5 / counts.pairs**0.5 and counts.alone == 0
    assert count_pairs(make_corpus(60), SentencePairs(task="sentence_order", random_fraction=0), "train", 64).rate == 0


def test_one_sentence_documents_are_refused():
    corpus = InMemoryCorpus([[[7] * 20]] * 40, 500)
    with pytest.raises(DataError, match="two sentences or more; all 40 documents"):
        Dataset(corpus, ORDER, Masking(), sequence_length=32, batch_size=4)
    with pytest.raises(DataError, match="no sentence pair"):
        count_pairs(corpus, ORDER, "train", 32)


def test_older_identities_stay():
    assert identity(SentencePairs()).keys() == {"kind", "short_fraction", "random_fraction"}
    assert identity(ORDER)["task"] == "sentence_order"
    with pytest.raises(ValidationError, match="task"):
        SentencePairs(task="order")
