"""RoBERTa's FULL-SENTENCES and DOC-SENTENCES against their rule, sentence by sentence."""

from __future__ import annotations

import numpy as np
import pytest

from bertgpt_jax.batches import sentences
from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.packing import PackedDocuments
from bertgpt_jax.batches.sentences import DocSentences, FullSentences
from bertgpt_jax.corpus.special import TRAINED_IDS
from bertgpt_jax.corpus.view import InMemoryCorpus
from bertgpt_jax.errors import ConfigError

T = 34
ROOM = T - 2
SPECIAL = TRAINED_IDS


def numbered(lengths: list[list[int]], shards: int = 1, held_out: int = 0) -> InMemoryCorpus:
    """Documents of sentences of these lengths; every token is a number of its own, from 6."""
    number = iter(range(6, 100_000))
    documents = [[[next(number) for _ in range(n)] for n in document] for document in lengths]
    cut = len(documents) - held_out
    return InMemoryCorpus(documents[:cut], 100_000, held_out=documents[cut:], shards=shards)


def rows_of(corpus: InMemoryCorpus, examples, split: str = "train") -> list[list[int]]:
    """The tokens of every row in stored order, unmasked, without padding."""
    data = Dataset(corpus, examples, Masking(), split=split, sequence_length=T, batch_size=1)
    found = []
    for i in range(data.eval_batches()):
        batch = data.eval_batch(i)
        for row in np.flatnonzero(batch["segments"].any(1)):
            tokens, real = batch["tokens"][row].copy(), batch["mask_weights"][row] > 0
            tokens[batch["mask_positions"][row][real]] = batch["mask_labels"][row][real]
            length = int(batch["segments"][row].sum())
            assert (batch["segments"][row] == (np.arange(T) < length)).all() and (tokens[length:] == SPECIAL.pad).all()
            found.append(tokens[:length].tolist())
    return found


def gathered(corpus_lengths: list[list[int]], cross: bool) -> list[list[int]]:
    """The rule, said plainly: sentences in order as long as the row holds them, a [SEP] between two documents."""
    number, rows, row = 6, [], []
    for d, document in enumerate(corpus_lengths):
        if row and not cross:
            rows, row = [*rows, row], []
        for s, length in enumerate(document):
            tokens = list(range(number, number + length))
            number += length
            separator = [SPECIAL.sep] if row and s == 0 and d else []
            for part in [tokens[i : i + ROOM] for i in range(0, length, ROOM)]:
                if row and len(row) + len(separator) + len(part) > ROOM:
                    rows, row, separator = [*rows, row], [], []
                row, separator = [*row, *separator, *part], []
    return [[SPECIAL.cls, *row, SPECIAL.sep] for row in [*rows, row]]


@pytest.mark.parametrize("examples", [FullSentences(), DocSentences()], ids=lambda e: e.kind)
def test_rows_follow_the_rule(examples):
    rng = np.random.default_rng(0)
    for _ in range(5):
        lengths = [rng.integers(1, 25, rng.integers(1, 9)).tolist() for _ in range(30)]
        expected = gathered(lengths, isinstance(examples, FullSentences))
        assert rows_of(numbered(lengths), examples) == expected
        assert any(len(row) < T for row in expected) and any(len(row) == T for row in expected)


@pytest.mark.parametrize("examples", [FullSentences(), DocSentences()], ids=lambda e: e.kind)
def test_a_sentence_longer_than_a_row_is_cut(examples):
    lengths = [[5, 100, 3, 40], [70]]
    rows = rows_of(numbered(lengths), examples)
    tokens = [t for row in rows for t in row if t >= 6]
    assert tokens == list(range(6, 6 + 218))
    assert rows == gathered(lengths, isinstance(examples, FullSentences))


def test_doc_sentences_do_not_cross_documents_and_full_sentences_do():
    lengths = [[4, 5], [6], [3, 3]]
    assert [len(row) for row in rows_of(numbered(lengths), DocSentences())] == [11, 8, 8]
    (row,) = rows_of(numbered(lengths), FullSentences())
    assert [i for i, token in enumerate(row) if token == SPECIAL.sep] == [10, 17, 24]


def test_full_sentences_end_with_their_window(monkeypatch):
    """Windows are planned one by one; a row does not reach into the next."""
    corpus = numbered([[10]] * 8)
    assert [len(row) for row in rows_of(corpus, FullSentences())] == [34, 34, 23]  # three documents, two separators
    halves = np.array([[0, 0, 4], [0, 4, 8]])
    monkeypatch.setattr(sentences, "document_windows", lambda corpus, split: halves)
    assert [len(row) for row in rows_of(corpus, FullSentences())] == [34, 12, 34, 12]


@pytest.mark.parametrize("examples", [FullSentences(), DocSentences()], ids=lambda e: e.kind)
def test_splits_and_shards_are_apart(examples):
    lengths = [[7, 9], [20]] * 6
    corpus = numbered(lengths, shards=3, held_out=4)
    train, held = rows_of(corpus, examples), rows_of(corpus, examples, "held_out")
    first_held = sum(sum(document) for document in lengths[:-4]) + 6
    assert all(token < first_held for row in train for token in row)
    assert sorted(t for row in held for t in row if t >= 6) == list(range(first_held, 6 + 36 * 6))


def test_packing_at_sentences_has_the_pieces_of_doc_sentences():
    rng = np.random.default_rng(1)
    corpus = numbered([rng.integers(1, 25, rng.integers(1, 9)).tolist() for _ in range(40)])
    packed = Dataset(corpus, PackedDocuments(cut="sentences"), Masking(), sequence_length=T, batch_size=4)
    plain = Dataset(corpus, DocSentences(), Masking(), sequence_length=T, batch_size=4)

    def pieces(data: Dataset) -> list[tuple]:
        rows = data._rows.spans(0, np.arange(data.rows_per_epoch(0)))
        return sorted((int(s), int(n)) for s, n in zip(*(x.flat for x in rows), strict=True) if n)

    assert pieces(packed) == pieces(plain)
    assert packed.rows_per_epoch(0) < plain.rows_per_epoch(0)
    assert packed.packing_efficiency() > plain.packing_efficiency()


def test_order_changes_with_the_epoch_and_nothing_else():
    corpus = numbered([[5, 9], [8]] * 20)
    data = Dataset(corpus, FullSentences(), Masking(), sequence_length=T, batch_size=4)
    count = data.rows_per_epoch(0)
    orders = [data._rows.order(epoch, np.arange(count)) for epoch in (0, 1)]
    assert orders[0].tolist() != orders[1].tolist() and sorted(orders[0]) == sorted(orders[1]) == list(range(count))
    for a, b in zip(data._rows.spans(0, np.arange(count)), data._rows.spans(1, np.arange(count)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_masking_is_needed():
    with pytest.raises(ConfigError, match="doc_sentences.*masking"):
        Dataset(numbered([[9]] * 9), DocSentences(), None, sequence_length=T, batch_size=1)
