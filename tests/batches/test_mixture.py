"""Mixtures: shares in closed form, rows numbered without gaps, schedules, evaluation part by part."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.mixture import SLACK, UNIT, Mixture, Shares, parts_of
from bertgpt_jax.batches.streams import ContiguousStreams
from bertgpt_jax.batches.windows import Windows
from bertgpt_jax.corpus.view import InMemoryCorpus
from bertgpt_jax.errors import ConfigError

WEIGHTS = st.lists(st.floats(1e-4, 1), min_size=1, max_size=12)


# ---------------------------------------------------------------- shares


@settings(max_examples=60)
@given(weights=WEIGHTS, first=st.integers(0, 2**40))
def test_rows_are_dealt_by_weight_and_numbered_without_gaps(weights: list[float], first: int) -> None:
    shares, rows = Shares(weights), np.arange(first, first + 2000)
    counts = shares.counts(rows)
    assert (counts.sum(0) == rows).all()
    units = [round(w / sum(weights) * UNIT) for w in weights]
    for count, unit in zip(counts, units, strict=True):
        whole, rest = np.divmod(rows, sum(units))
        assert np.abs(count - whole * unit - rest * unit / sum(units)).max() < (1 if len(weights) <= 3 else SLACK)
    corpus, number = shares.deal(rows)
    for c in range(len(weights)):
        assert (number[corpus == c] == counts[c, 0] + np.arange((corpus == c).sum())).all()


def test_known_shares() -> None:
    corpus, number = Shares([1, 2, 0]).deal(np.arange(9))
    assert [np.bincount(corpus[i : i + 3], minlength=3).tolist() for i in (0, 3, 6)] == [[1, 2, 0]] * 3
    assert number[corpus == 1].tolist() == [0, 1, 2, 3, 4, 5]
    gpt3 = Shares([60, 22, 8, 8, 3])  # the table's shares add up to 101
    assert gpt3.counts(np.array([101_000]))[:, 0].tolist() == [60_000, 22_000, 8_000, 8_000, 3_000]


# ---------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def corpora(make_corpus) -> dict[str, InMemoryCorpus]:
    return {name: make_corpus(n, seed=n, held_out=n // 4) for name, n in {"wiki": 60, "books": 30, "code": 12}.items()}


def mixture(corpora, weights=(0.6, 0.3, 0.1), changes=(), split="train", batch_size=1, **more) -> Mixture:
    settings = {"split": split, "sequence_length": 16, "batch_size": batch_size}
    parts = {name: Dataset(corpus, Windows(), None, **settings) for name, corpus in corpora.items()}
    return Mixture(parts, weights, changes, batch_size=batch_size, **more)


def drawn(data: Mixture, first: int, size: int) -> list[str]:
    return [row["corpus"] for row in data.describe_at(data.numbers(first, size))]


def test_a_batch_has_the_shares_and_is_shuffled(corpora) -> None:
    data = mixture(corpora)
    batches = [drawn(data, 20 * n, 20) for n in range(30)]
    for names in batches:
        assert abs(names.count("wiki") - 12) <= 1 and abs(names.count("code") - 2) <= 1
    assert np.sum([names.count("books") for names in batches]) == 180
    places = np.mean([[name == "wiki" for name in names] for names in batches], axis=0)
    assert 0.2 < places.min() and places.max() < 0.95, "no place of the batch belongs to one corpus"
    assert drawn(mixture(corpora, seed=1), 0, 20) != batches[0]


def test_rows_never_change() -> None:
    """A difference here changes every run of a mixture."""
    corpus, number = Shares([0.6, 0.3, 0.1]).deal(np.arange(20))
    assert "".join("wbc"[c] for c in corpus) == "wbwbwwcwbwwbwbwwcwbw"
    assert number.tolist() == [0, 0, 1, 1, 2, 3, 0, 4, 2, 5, 6, 3, 7, 4, 8, 9, 1, 10, 5, 11]
    assert [x.tolist() for x in Shares([1, 1e-12]).deal(np.array([2**40]))] == [[0], [2**40 - 2**10]], "1/UNIT at least"


def test_rows_are_those_of_the_parts(corpora) -> None:
    data = mixture(corpora)
    numbers = data.numbers(40, 20)
    batch, described = data.at(numbers), data.describe_at(numbers)
    for name, part in data.parts.items():
        mine = [i for i, row in enumerate(described) if row["corpus"] == name]
        first = data.seen(40)[name]
        order = sorted(mine, key=lambda i: numbers[i])
        expected = part.at(np.arange(first, first + len(mine)))
        for key, value in expected.items():
            np.testing.assert_array_equal(batch[key][order], value)


@settings(max_examples=20)
@given(n=st.integers(0, 500), rows=st.lists(st.integers(0, 15), max_size=10))
def test_a_batch_depends_on_its_number_alone(corpora, n: int, rows: list[int]) -> None:
    used, fresh = mixture(corpora, batch_size=16), mixture(corpora, batch_size=16)
    part, whole = used.batch(n, np.array(rows, np.int64)), fresh.batch(n)
    for name, value in part.items():
        np.testing.assert_array_equal(value, whole[name][rows])
        assert value.dtype == whole[name].dtype
    assert [row["corpus"] for row in used.describe(n, np.array(rows, np.int64))] == [
        fresh.describe(n)[i]["corpus"] for i in rows
    ]


def test_weights_change_where_the_schedule_says(corpora) -> None:
    changes = [(100, (0.0, 0.5, 0.5)), (100, (0.2, 0.2, 0.6)), (160, (1.0, 0.0, 0.0))]
    data, before = mixture(corpora, changes=changes), mixture(corpora)
    names = drawn(data, 0, 100) + drawn(data, 100, 60) + drawn(data, 160, 40)
    assert drawn(before, 0, 100) == names[:100], "what was before does not change"
    assert [names[100:160].count(name) for name in corpora] == [12, 12, 36], "of two at one row the later one holds"
    assert set(names[160:]) == {"wiki"}
    for rows in (0, 1, 99, 100, 101, 160, 200):
        assert data.seen(rows) == {name: names[:rows].count(name) for name in corpora} or rows in (1, 99, 101)
    assert data.seen(200) == {"wiki": 60 + 12 + 40, "books": 30 + 12, "code": 10 + 36}
    assert data.fingerprint != before.fingerprint == mixture(corpora).fingerprint


def test_every_row_of_every_corpus_once_an_epoch(corpora) -> None:
    data = mixture(corpora, changes=[(50, (0.1, 0.4, 0.5))])
    last, seen = 0, []
    while min(data.seen(last)[name] / part.rows_per_epoch() for name, part in data.parts.items()) < 1:
        seen += data.describe_at(data.numbers(last, 64))
        last += 64
    for name, part in data.parts.items():
        examples = [row["example"] for row in seen if row["corpus"] == name and row["epoch"] == 0]
        assert sorted(examples) == list(range(part.rows_per_epoch()))


def test_sizes(corpora) -> None:
    data = mixture(corpora, batch_size=16)
    rows = sum(part.rows_per_epoch() for part in data.parts.values())
    assert (data.tokens_per_batch, data.rows_per_epoch()) == (256, rows)
    assert data.epoch_of(10) == 160 / rows
    assert mixture(corpora, epoch_rows=77).rows_per_epoch() == 77
    with pytest.raises(IndexError, match="-1"):
        data.batch(-1)


def test_streams_cannot_be_mixed(corpora) -> None:
    parts = {
        name: Dataset(corpus, ContiguousStreams(), None, sequence_length=16, batch_size=4)
        for name, corpus in corpora.items()
    }
    with pytest.raises(ConfigError, match="contiguous_streams.*mixture"):
        Mixture(parts, [1, 1, 1], batch_size=4)


# ---------------------------------------------------------------- evaluation


def test_evaluation_goes_part_by_part(corpora) -> None:
    data = mixture(corpora, split="held_out", batch_size=16)
    assert data.eval_rows() == sum(part.eval_rows() for part in parts_of(data).values())
    batches = [part.eval_batch(i) for part in data.parts.values() for i in range(part.eval_batches())]
    assert data.eval_batches() == len(batches)
    for i, expected in enumerate(batches):
        for name, value in data.eval_batch(i, np.array([3, 1])).items():
            np.testing.assert_array_equal(value, expected[name][[3, 1]])
    for beyond in (-1, len(batches)):
        with pytest.raises(IndexError, match=f"{beyond} of {len(batches)}"):
            data.eval_batch(beyond)
    assert data.eval_fingerprint() == mixture(corpora, (0.1, 0.1, 0.8), split="held_out").eval_fingerprint()
    part = data.parts["wiki"]
    assert parts_of(part) == {"": part}
