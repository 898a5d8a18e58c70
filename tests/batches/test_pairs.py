"""Sentence pairs against BERT's algorithm written down sentence by sentence."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgpt_jax.batches import bits
from bertgpt_jax.batches.pairs import PairPlan, SentencePairs, Sentences, plan_pairs, read_sentences
from bertgpt_jax.corpus.view import InMemoryCorpus


def sentences_of(lengths: list[list[int]], shard: int = 3) -> Sentences:
    """Documents given as lists of sentence lengths, as `read_sentences` lays them out."""
    documents = [[[7] * n for n in document] for document in lengths]
    corpus = InMemoryCorpus(documents, 10)
    sentences = read_sentences(corpus, 0, 0, len(lengths))
    return Sentences(**{**vars(sentences), "number": sentences.number + (shard << 32)})


class Draws:
    """The draws of `plan_pairs`, asked for in the words of the original's random generator."""

    def __init__(self, sentences: Sentences, document: int, seed: int, epoch: int):
        self._number = sentences.number[document : document + 1]
        self._seed, self._epoch = seed, epoch
        self.target = self._words("pair-target", 2)

    def _words(self, purpose: str, count: int, sub: int = 0) -> np.ndarray:
        return bits.words(bits.stream(self._seed, purpose, self._epoch), self._number, count, sub)[0]

    def chunk(self, sentence: int) -> np.ndarray:
        return self._words("pair", 4, sentence)

    def front(self, side: str, cut: int, sentence: int) -> int:
        key = bits.stream(self._seed, "pair-truncation", side, self._epoch)
        return int(bits.coin_sums(key, self._number, np.array([cut]), sub=sentence)[0])


def bert_pairs(config: SentencePairs, lengths: list[list[int]], sentences, length: int, seed: int, epoch: int) -> list:
    """create_instances_from_document over lengths: (A, B, random), A and B as (first token, tokens) of the window."""
    room, out = length - 3, []
    begins = [sentences.start[a:b].tolist() for a, b in zip(sentences.first, sentences.first[1:], strict=False)]
    for d, document in enumerate(lengths):
        draws = Draws(sentences, d, seed, epoch)
        short = int(draws.target[0]) < round(config.short_fraction * 2**32)
        target = 2 + int(draws.target[1]) * (room - 1) // 2**32 if short else room
        chunk: list[int] = []
        i = 0
        while i < len(document):
            chunk.append(i)
            if i == len(document) - 1 or sum(document[s] for s in chunk) >= target:
                a_end, is_random, other, begin = (int(w) for w in draws.chunk(chunk[0]))
                a = chunk[: 1 + a_end * max(len(chunk) - 1, 1) // 2**32]
                size = sum(document[s] for s in a)
                if len(chunk) == 1 or is_random < round(config.random_fraction * 2**32):
                    other = other * max(len(lengths) - 1, 1) // 2**32
                    other += len(lengths) > 1 and other >= d
                    first = begin * len(lengths[other]) // 2**32
                    b_begin, b_size = begins[other][first], 0
                    for s in lengths[other][first:]:
                        b_size += s
                        if b_size >= target - size:
                            break
                    out.append(((begins[d][a[0]], size), (b_begin, b_size), True, chunk[0]))
                    i -= len(chunk) - len(a)
                else:
                    b = chunk[len(a) :]
                    b_size = sum(document[s] for s in b)
                    out.append(((begins[d][a[0]], size), (begins[d][b[0]], b_size), False, chunk[0]))
                out[-1] = truncate(*out[-1], room, draws)
                chunk = []
            i += 1
    return out


def truncate(a, b, is_random, sentence, room, draws) -> tuple:
    """truncate_seq_pair: tokens are popped one by one from the longer."""
    sizes, cuts = [a[1], b[1]], [0, 0]
    while sum(sizes) > room:
        longer = 0 if sizes[0] > sizes[1] else 1
        sizes[longer] -= 1
        cuts[longer] += 1
    left = [draws.front("a", cuts[0], sentence), draws.front("b", cuts[1], sentence)]
    return ((a[0] + left[0], sizes[0]), (b[0] + left[1], sizes[1]), is_random)


def rows(plan: PairPlan) -> list:
    return [
        ((int(a), int(m)), (int(b), int(n)), bool(r))
        for (a, b), (m, n), r in zip(plan.start, plan.length, plan.random, strict=True)
    ]


documents = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=15), min_size=1, max_size=8)
configs = st.builds(SentencePairs, short_fraction=st.sampled_from([0, 0.1, 0.7, 1]), random_fraction=st.floats(0, 1))


@settings(max_examples=150, deadline=None)
@given(documents, configs, st.integers(16, 90), st.integers(0, 9), st.integers(0, 3))
def test_plan_is_berts_algorithm(lengths, config, length, seed, epoch):
    sentences = sentences_of(lengths)
    plan = plan_pairs(config, sentences, length, seed, epoch)
    assert rows(plan) == bert_pairs(config, lengths, sentences, length, seed, epoch)
    assert plan.tally == sum(len(document) > 1 for document in lengths)
    assert (plan.length >= 1).all() and (plan.length.sum(1) <= length - 3).all()


@settings(deadline=None)
@given(documents, st.integers(0, 9))
def test_each_sentence_is_used_once(lengths, seed):
    """As A, or as the true next of A; what a random B replaces is put back."""
    one_token = [[1] * len(document) for document in lengths]  # nothing to truncate
    sentences = sentences_of(one_token)
    plan = plan_pairs(SentencePairs(short_fraction=0.5), sentences, 20, seed, 0)
    own = np.ones((len(plan), 2), bool)
    own[:, 1] = ~plan.random
    used = [t for s, n in zip(plan.start[own], plan.length[own], strict=True) for t in range(s, s + n)]
    assert sorted(used) == sentences.start.tolist()


@settings(deadline=None)
@given(documents.filter(lambda d: len(d) > 1), st.integers(0, 9))
def test_random_next_is_another_document(lengths, seed):
    sentences = sentences_of(lengths)
    plan = plan_pairs(SentencePairs(), sentences, 32, seed, 0)
    begins = sentences.start[sentences.first[:-1]]
    owner = np.searchsorted(begins, plan.start, "right") - 1
    assert ((owner[:, 0] != owner[:, 1]) == plan.random).all()


def test_a_single_document_has_nothing_else_to_draw_from():
    plan = plan_pairs(SentencePairs(random_fraction=1), sentences_of([[5, 6, 7]]), 32, 0, 0)
    assert plan.random.all() and len(plan) >= 2
    assert (plan.start >= 0).all() and (plan.start + plan.length <= 18).all()


def test_sentences_longer_than_a_row():
    plan = plan_pairs(SentencePairs(), sentences_of([[100_000], [3, 100_000, 3], [2] * 5]), 64, 0, 0)
    assert (plan.length.sum(1) <= 61).all() and (plan.length >= 1).all()
    assert plan.length.sum(1).max() == 61
    # a fair coin for each of about 100,000 popped tokens
    assert abs(plan.start[0, 0] - 50_000) < 1000


@pytest.mark.parametrize("empty", [[[]], [[], []], [[], [4, 5], []]])
def test_empty_documents(empty):
    corpus = InMemoryCorpus([[[7] * n for n in document] for document in empty], 10)
    sentences = read_sentences(corpus, 0, 0, len(empty))
    plan = plan_pairs(SentencePairs(), sentences, 32, 0, 0)
    assert (len(plan) > 0) == any(empty) and plan.tally == sum(len(document) > 1 for document in empty)
    assert len(sentences.number) == sum(map(bool, empty))


def test_sentences_are_read_between_terminators():
    corpus = InMemoryCorpus([[[9] * 4], [], [[8] * 2, [7] * 3], [[6]]], 10, held_out=[[[9] * 5]])
    sentences = read_sentences(corpus, 0, 1, 5)
    assert sentences.base == 5
    assert sentences.start.tolist() == [1, 3, 7, 9] and sentences.length.tolist() == [2, 3, 1, 5]
    assert sentences.first.tolist() == [0, 2, 3, 4] and sentences.number.tolist() == [2, 3, 4]


def test_plans_differ_by_epoch_seed_and_document():
    sentences = sentences_of([[5, 9, 4, 12, 7]] * 60)
    plans = [rows(plan_pairs(SentencePairs(), sentences, 24, *key)) for key in [(0, 0), (0, 1), (1, 0)]]
    assert plans[0] != plans[1] and plans[0] != plans[2]
    assert plans[0] == rows(plan_pairs(SentencePairs(), sentences, 24, 0, 0))
    starts = np.array([row[0][0] for row in plans[0]])
    within = {tuple((starts[starts // 38 == d] % 38).tolist()) for d in range(60)}
    assert len(within) > 5  # equal documents of 38 tokens, cut differently


def original(lengths: list[list[int]], length: int, rng: random.Random) -> tuple[float, list[int]]:
    """The original with its own generator: share of random next, and total lengths of the rows."""
    room, label, size = length - 3, [], []
    for d, document in enumerate(lengths):
        target = rng.randint(2, room) if rng.random() < 0.1 else room
        chunk: list[int] = []
        i = 0
        while i < len(document):
            chunk.append(document[i])
            if i == len(document) - 1 or sum(chunk) >= target:
                a_end = rng.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
                a, b = sum(chunk[:a_end]), sum(chunk[a_end:])
                label.append(len(chunk) == 1 or rng.random() < 0.5)
                if label[-1]:
                    other = d
                    while other == d:
                        other = rng.randint(0, len(lengths) - 1)
                    b = 0
                    for n in lengths[other][rng.randint(0, len(lengths[other]) - 1) :]:
                        b += n
                        if b >= target - a:
                            break
                    i -= len(chunk) - a_end
                size.append(min(a + b, room))
                chunk = []
            i += 1
    return float(np.mean(label)), size


@pytest.mark.parametrize("mean, length", [(8, 128), (25, 128), (25, 512)])
def test_statistics_of_the_original(mean, length):
    """Rows, share of random next and mean length of a pass, over passes: equal within four standard errors."""
    rng = np.random.default_rng(mean)
    counts = np.maximum(rng.lognormal(np.log(mean) - 0.32, 0.8, 250).astype(int), 1)
    lengths = [np.maximum(rng.lognormal(np.log(22), 0.5, n).astype(int), 1).tolist() for n in counts]
    sentences = sentences_of(lengths)
    passes = [original(lengths, length, random.Random(seed)) for seed in range(24)]
    plans = [plan_pairs(SentencePairs(), sentences, length, 0, epoch) for epoch in range(60)]
    theirs = np.array([(len(size), label, np.mean(size)) for label, size in passes])
    ours = np.array([(len(plan), plan.random.mean(), plan.length.sum(1).mean()) for plan in plans])
    error = np.sqrt(theirs.var(0, ddof=1) / len(theirs) + ours.var(0, ddof=1) / len(ours))
    assert (np.abs(theirs.mean(0) - ours.mean(0)) < 4 * error).all()
    assert (error < 0.02 * theirs.mean(0)).all()  # so that the comparison says something
    assert ours[:, 1].mean() > 0.52
