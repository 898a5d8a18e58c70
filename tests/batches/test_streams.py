"""Contiguous streams: every lane goes on where it ended, and all lanes together are the epoch's text."""

from __future__ import annotations

import numpy as np
import pytest

from bertgpt_jax.batches import streams
from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.streams import ContiguousStreams
from bertgpt_jax.corpus.view import InMemoryCorpus
from bertgpt_jax.errors import ConfigError, DataError

T, LANES = 12, 5


@pytest.fixture(scope="module")
def corpus(make_corpus) -> InMemoryCorpus:
    return make_corpus(70, held_out=12, shards=3)


@pytest.fixture
def many_windows(monkeypatch) -> None:
    """Windows of ten documents, so that an epoch has an order of documents."""

    def windows(corpus, split):
        cuts = [(shard, range(lo, hi, 10), hi) for shard, lo, hi in corpus.split_documents(split)]
        return np.array([(shard, a, min(a + 10, hi)) for shard, begins, hi in cuts for a in begins])

    monkeypatch.setattr(streams, "document_windows", windows)


def dataset(corpus, **changes) -> Dataset:
    return Dataset(
        corpus, ContiguousStreams(), None, **{"sequence_length": T, "batch_size": LANES, "debug": True, **changes}
    )


def lanes_of(data: Dataset, first: int, stop: int) -> np.ndarray:
    """[LANES, T * batches] tokens of batches first..stop-1 joined along each lane."""
    return np.concatenate([data.batch(n)["tokens"] for n in range(first, stop)], axis=1)


@pytest.mark.usefixtures("many_windows")
def test_a_row_continues_the_same_row_of_the_batch_before(corpus):
    data = dataset(corpus)
    segments = data.rows_per_epoch() // LANES
    for n in range(segments * 2):
        batch = data.batch(n)
        assert set(batch) == {"tokens", "targets", "positions", "weights", "resets"}
        np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
        assert (batch["weights"] == 1).all() and (batch["positions"] == np.arange(T)).all()
        assert batch["resets"].dtype == np.int32 and (batch["resets"] == (n % segments == 0)).all()
        if n % segments:
            np.testing.assert_array_equal(batch["tokens"][:, 0], data.batch(n - 1)["targets"][:, -1])


@pytest.mark.usefixtures("many_windows")
def test_lanes_are_the_epochs_text_cut_evenly(corpus):
    """Documents in an order of the epoch's own, each whole and with its end, but for the cut tail."""
    data = dataset(corpus)
    segments, seen = data.rows_per_epoch() // LANES, []
    parts = [np.arange(a, b) for _, a, b in corpus.split_tokens("train")]
    total = sum(map(len, parts))
    assert segments == (total - 1) // (T * LANES) > 10
    for epoch in (0, 1):
        lanes = lanes_of(data, epoch * segments, (epoch + 1) * segments)
        rows = np.arange(segments * LANES).reshape(segments, LANES)
        starts, lengths = data._rows.spans(epoch, rows.T.reshape(-1))  # lane by lane
        assert (lengths.sum(1) == T + 1).all()
        coordinates = np.concatenate(
            [
                np.concatenate([np.arange(s, s + n) for s, n in zip(*row, strict=True)])[:T]
                for row in zip(starts, lengths, strict=True)
            ]
        )
        np.testing.assert_array_equal(corpus.gather(coordinates, np.ones_like(coordinates)), lanes.reshape(-1))
        assert len(np.unique(coordinates)) == len(coordinates) > total - T * LANES - 1
        jumps = np.flatnonzero(np.diff(coordinates) != 1) + 1
        begins = {int(s) for row in corpus.split_documents("train") for s in corpus.document_spans(*row)[0]}
        assert set(coordinates[jumps].tolist()) <= begins, "the text jumps only to where a document begins"
        seen.append(coordinates.tolist())
    assert seen[0] != seen[1]


def test_one_window_a_shard_is_the_stored_text(corpus):
    data = dataset(corpus, batch_size=1, sequence_length=8)
    stored = [corpus.gather(np.array([a]), np.array([b - a])).tolist() for _, a, b in corpus.split_tokens("train")]
    text = np.concatenate([data.batch(n)["tokens"][0] for n in range(data.rows_per_epoch())]).tolist()
    first = next(part for part in stored if part[:20] == text[:20])
    assert text[: len(first)] == first


@pytest.mark.usefixtures("many_windows")
def test_any_batch_is_found_at_once_and_in_part(corpus):
    used = dataset(corpus)
    for n in (37, 0, 90, 36, 1):
        whole = dataset(corpus).batch(n)
        for rows in ([], [4], [3, 0, 3]):
            for name, value in used.batch(n, np.array(rows, np.int64)).items():
                np.testing.assert_array_equal(value, whole[name][rows])


def test_evaluation_scores_every_token_once(corpus):
    """In stored order; the last lane ends early, with weights 0."""
    data = dataset(corpus, split="held_out")
    batches = [data.eval_batch(i) for i in range(data.eval_batches())]
    scored = [batch["targets"][lane][batch["weights"][lane] > 0] for lane in range(LANES) for batch in batches]
    stored = np.concatenate(
        [corpus.gather(np.array([a]), np.array([b - a])) for _, a, b in corpus.split_tokens("held_out")]
    )
    np.testing.assert_array_equal(np.concatenate(scored), stored[1:])
    assert [batch["resets"].tolist() for batch in batches[:2]] == [[1] * LANES, [0] * LANES]


def test_seeds_differ(corpus, many_windows):
    assert (dataset(corpus).batch(0)["tokens"] != dataset(corpus, seed=1).batch(0)["tokens"]).any()


def test_refusals(corpus):
    with pytest.raises(ConfigError, match="contiguous_streams.*no masking"):
        Dataset(corpus, ContiguousStreams(), Masking(), sequence_length=T, batch_size=LANES)
    with pytest.raises(DataError, match="0 rows of 512 tokens.*batch_size = 900"):
        dataset(corpus, sequence_length=512, batch_size=900)
