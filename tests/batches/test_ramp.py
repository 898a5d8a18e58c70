"""Ramps of batch size and sequence length: closed forms against counting, and no row twice or left out."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.mixture import Mixture
from bertgpt_jax.batches.ramp import Ramp, Ramped, batch_ramp
from bertgpt_jax.batches.streams import ContiguousStreams
from bertgpt_jax.batches.windows import Windows
from bertgpt_jax.errors import ConfigError

CHANGES = st.lists(st.tuples(st.integers(1, 20), st.sampled_from((2, 4, 8, 16))), max_size=4, unique_by=lambda c: c[0])


def changes(found: list[tuple[int, int]], first: int) -> tuple[tuple[int, int], ...]:
    return ((0, first), *sorted(found))


@given(sizes=CHANGES, lengths=CHANGES, amount=st.integers(1, 4000))
def test_closed_forms_are_what_counting_gives(sizes, lengths, amount: int) -> None:
    ramp = Ramp(changes(sizes, 4), changes(lengths, 8))
    tokens, rows, shapes = 0, {8: 0}, []
    for n in range(60):
        size = [value for first, value in changes(sizes, 4) if first <= n][-1]
        length = [value for first, value in changes(lengths, 8) if first <= n][-1]
        segment = ramp.segment(n)
        assert (segment.batch_size, segment.sequence_length) == (size, length)
        assert ramp.segments[ramp.index(n)] is segment
        assert ramp.tokens_before(n) == tokens
        assert {k: v for k, v in ramp.rows_before(n).items() if v} == {k: v for k, v in rows.items() if v}
        shapes.append((size, length))
        tokens, rows[length] = tokens + size * length, rows.get(length, 0) + size
    needed = ramp.batches_for(amount, lambda length: length)
    assert ramp.tokens_before(needed) >= amount > ramp.tokens_before(needed - 1)
    worth = {length: Fraction(1, 10 * length) for length in {length for _, length in shapes}}
    needed = ramp.batches_for(Fraction(1, 3), worth.__getitem__)
    totals = [sum(k * worth[length] for length, k in ramp.rows_before(n).items()) for n in (needed - 1, needed)]
    assert totals[0] < Fraction(1, 3) <= totals[1]
    with pytest.raises(IndexError, match="-1"):
        ramp.segment(-1)


def test_a_ramp_in_tokens() -> None:
    """Of Megatron's script for 175B: "0:16 2.4B:320 4.8B:624 7.2B:928 9.6B:1232 12B:1536"."""
    sizes = ((0, 16), (2.4e9, 320), (4.8e9, 624), (7.2e9, 928), (9.6e9, 1232), (12e9, 1536))
    found = batch_ramp(sizes, 2048)
    assert [size for _, size in found] == [size for _, size in sizes]
    assert found[:2] == ((0, 16), (73_243, 320)), "2.4e9 / 32,768, rounded up"
    ramp = Ramp(found, ((0, 2048),))
    for (step, _), (tokens, _), before in zip(found[1:], sizes[1:], sizes, strict=False):
        assert ramp.tokens_before(step - 1) < tokens <= ramp.tokens_before(step) < tokens + before[1] * 2048
    steps = ramp.batches_for(300 * 10**9, lambda length: length)
    assert 300e9 <= ramp.tokens_before(steps) < 300e9 + 1536 * 2048


# ---------------------------------------------------------------- rows


@pytest.fixture(scope="module")
def corpora(make_corpus):
    return {"a": make_corpus(30, seed=1), "b": make_corpus(12, seed=2)}


def data(corpora, length: int, mixed: bool) -> Dataset | Mixture:
    parts = {k: Dataset(c, Windows(), None, sequence_length=length, batch_size=1) for k, c in corpora.items()}
    return Mixture(parts, [0.7, 0.3], batch_size=4) if mixed else parts["a"]


@pytest.mark.parametrize("mixed", [False, True])
def test_rows_are_used_once_across_changes_of_the_batch_size(corpora, mixed: bool) -> None:
    plain = data(corpora, 16, mixed)
    ramped = Ramped(Ramp(((0, 2), (3, 8), (10, 32)), ((0, 16),)), {16: plain})
    rows = [row for n in range(14) for row in ramped.describe(n)]
    assert len(rows) == 3 * 2 + 7 * 8 + 4 * 32
    key = lambda row: (row.get("corpus", ""), row["epoch"], row["example"])  # noqa: E731
    assert sorted(map(key, rows)) == sorted(map(key, plain.describe_at(np.arange(len(rows)))))
    batch = ramped.batch(11, np.array([31, 0]))
    for name, value in ramped.batch(11).items():
        assert len(value) == 32
        np.testing.assert_array_equal(batch[name], value[[31, 0]])


def test_a_length_that_comes_back_goes_on_where_it_was_left(corpora) -> None:
    lengths = {length: data(corpora, length, mixed=False) for length in (16, 32)}
    ramped = Ramped(Ramp(((0, 4),), ((0, 16), (2, 32), (5, 16))), lengths)
    found = [row["example"] for n in (0, 1, 5, 6) for row in ramped.describe(n)]
    assert found == [row["example"] for row in lengths[16].describe_at(np.arange(16))]
    assert ramped.batch(2)["tokens"].shape == (4, 32)
    expected = 16 / lengths[16].rows_per_epoch() + 12 / lengths[32].rows_per_epoch()
    assert ramped.epochs_before(7) == pytest.approx(expected)
    assert ramped.seen_before(7) == {}


def test_what_was_seen_of_each_corpus(corpora) -> None:
    lengths = {length: data(corpora, length, mixed=True) for length in (16, 32)}
    ramped = Ramped(Ramp(((0, 10),), ((0, 16), (3, 32))), lengths)
    seen = ramped.seen_before(5)
    assert seen["a"]["rows"] == 21 + 14 and seen["a"]["tokens"] == 21 * 16 + 14 * 32
    assert seen["b"]["rows"] == 9 + 6
    parts = {length: lengths[length].parts["b"] for length in lengths}
    assert seen["b"]["epochs"] == pytest.approx(9 / parts[16].rows_per_epoch() + 6 / parts[32].rows_per_epoch())


def test_streams_have_no_ramp(corpora) -> None:
    streams = Dataset(corpora["a"], ContiguousStreams(), None, sequence_length=16, batch_size=4)
    assert Ramped(Ramp(((0, 4),), ((0, 16),)), {16: streams}).batch(3)
    with pytest.raises(ConfigError, match="contiguous_streams.*ramp"):
        Ramped(Ramp(((0, 2), (5, 4)), ((0, 16),)), {16: streams})
