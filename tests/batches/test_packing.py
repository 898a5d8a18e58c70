"""Packed rows: full, whole, laid out as a plain loop lays them out, the same whatever was asked before."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.packing import PackedDocuments, PackedPairs, fill_rows
from bertgpt_jax.batches.pairs import SentencePairs
from bertgpt_jax.config import identity
from bertgpt_jax.corpus.config import CorpusConfig, WordPieceConfig
from bertgpt_jax.corpus.special import TRAINED_IDS, SpecialIds
from bertgpt_jax.corpus.view import InMemoryCorpus
from bertgpt_jax.errors import ConfigError, DataError

T, ROWS = 64, 8
KINDS = {
    "documents": (PackedDocuments(), Masking()),
    "sentences": (PackedDocuments(cut="sentences"), Masking(whole_word=True)),
    "causal": (PackedDocuments(), None),
    "causal_sentences": (PackedDocuments(cut="sentences"), None),
    "pairs": (PackedPairs(short_fraction=0.5), Masking()),
    "word_pairs": (PackedPairs(max_segments=3), Masking(whole_word=True)),
}
SPECIAL = TRAINED_IDS


@pytest.fixture(scope="module")
def corpus(make_corpus) -> InMemoryCorpus:
    """Documents from a few tokens to several rows."""
    return make_corpus(90, held_out=20, shards=3, sentences=3, words=8, whole_words=True)


def dataset(corpus, kind: str, **changes) -> Dataset:
    examples, masking = KINDS[kind]
    chosen = {"sequence_length": T, "batch_size": ROWS, "seed": 3, "debug": True, **changes}
    return Dataset(corpus, examples, masking, **chosen)


def digest(batch: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(name.encode() + batch[name].tobytes() for name in sorted(batch))).hexdigest()[:16]


def an_epoch(data: Dataset) -> tuple[dict[str, np.ndarray], list[list[tuple[int, int, int, int]]]]:
    """All rows of the first epoch in one batch, and the documents of each."""
    whole = Dataset(**{**vars_of(data), "batch_size": data.rows_per_epoch(0)})
    return whole.batch(0), [row["documents"] for row in whole.describe(0)]


def vars_of(data: Dataset) -> dict:
    names = ("corpus", "examples", "masking", "split", "sequence_length", "batch_size", "seed")
    return {name: getattr(data, name) for name in names}


def stored(corpus, shard: int, document: int, first: int, stop: int) -> list[int]:
    """Tokens first..stop-1 of a document, as they are stored, the terminator among them."""
    start = corpus.document_spans(shard, document, document + 1)[0] + first
    return corpus.gather(start, np.array([stop - first])).tolist()


def restored(batch: dict[str, np.ndarray], row: int) -> list[int]:
    """The tokens of a row before they were masked."""
    tokens, real = batch["tokens"][row].copy(), batch["mask_weights"][row] > 0
    tokens[batch["mask_positions"][row][real]] = batch["mask_labels"][row][real]
    return tokens.tolist()


# ---------------------------------------------------------------- filling rows


@given(
    cost=st.lists(st.integers(1, 32), max_size=80),
    most=st.one_of(st.none(), st.integers(1, 5)),
)
def test_rows_hold_every_segment_once_and_no_more_than_they_can(cost, most):
    order, first = fill_rows(np.array(cost, np.int64), 32, most)
    assert sorted(order.tolist()) == list(range(len(cost)))
    rows = [np.array(cost)[order[a:b]] for a, b in zip(first, first[1:], strict=False)]
    assert all(len(row) for row in rows) and first[-1] == len(cost)
    assert all(row.sum() <= 32 and len(row) <= (most or len(cost)) for row in rows)
    room = [32 - int(row.sum()) for row in rows]
    if most is None:  # a row was opened, by its largest segment, because no row before had room for that
        assert all(int(row.max()) > r for k, row in enumerate(rows) for r in room[:k])


def test_rows_are_filled_fullest_first():
    order, first = fill_rows(np.array([3, 10, 4, 7, 6, 2]), 10)
    rows = [order[a:b].tolist() for a, b in zip(first, first[1:], strict=False)]
    assert rows == [[1], [0, 3], [2, 4], [5]]  # 10 alone; 3 goes to 7 (room 3) after 4 went to 6 (room 4)


def test_a_packed_log_normal_corpus_is_nearly_full(make_corpus):
    """Documents of 97 tokens in the mean, rows of 512; counted from the batches as well."""
    corpus = make_corpus(3000, sentences=6)
    for kind, least in [("documents", 0.99), ("causal", 0.99), ("sentences", 0.98), ("pairs", 0.98)]:
        data = dataset(corpus, kind, sequence_length=512, debug=False)
        batch, _ = an_epoch(data)
        assert data.packing_efficiency() == pytest.approx((batch["segments"] > 0).mean(), abs=1e-12)
        assert data.packing_efficiency() > least, kind
    padded = Dataset(corpus, SentencePairs(), Masking(), sequence_length=512, batch_size=8)
    assert padded.packing_efficiency() < 0.5
    rows = an_epoch(padded)[0]["segments"]
    assert padded.packing_efficiency() == pytest.approx((rows > 0).mean(), abs=1e-12)


@pytest.mark.slow
def test_efficiency_on_wikipedia(shared_data, tmp_path):
    """98% at 512 with BERT's vocabulary, on whole shards of WikiExtractor output."""
    from bertgpt_jax.corpus.builder import prepare_corpus
    from bertgpt_jax.corpus.reader import CorpusReader

    files = tuple(map(str, sorted((shared_data / "lm" / "enwiki-66M").glob("*.gz"))[:4]))
    vocabulary = WordPieceConfig(path=str(shared_data / "vocab" / "bert-base-uncased" / "vocab.txt"))
    prepare_corpus(CorpusConfig(path=files, tokenizer=vocabulary, workers=0), tmp_path / "wiki", progress=False)
    corpus = CorpusReader(tmp_path / "wiki")
    assert corpus.tokens.sum() > 500_000
    for kind in ("documents", "causal", "sentences"):
        assert dataset(corpus, kind, sequence_length=512).packing_efficiency() >= 0.98, kind
    pairs = Dataset(corpus, PackedPairs(), Masking(), sequence_length=512, batch_size=8)
    assert pairs.packing_efficiency() >= 0.98


# ---------------------------------------------------------------- purity


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(steps=st.lists(st.integers(0, 40), min_size=1, max_size=5), rows=st.lists(st.integers(0, ROWS - 1), max_size=9))
def test_a_batch_depends_on_its_number_alone(corpus, kind, steps, rows):
    """Whatever was asked before, in whatever order, whole or in part."""
    used = dataset(corpus, kind)
    used._rows._index._plans._capacity = 1  # forgets a window's plan as soon as it needs another
    for n in steps:
        part, whole = used.batch(n, np.array(rows, np.int64)), dataset(corpus, kind).batch(n)
        assert part.keys() == whole.keys()
        for name, value in part.items():
            np.testing.assert_array_equal(value, whole[name][rows])


GOLDEN = {
    "documents": "a7d6bad0cfa4dc8d",
    "sentences": "ad8ba0f88fac31b5",
    "causal": "85b29bfaac8ad049",
    "causal_sentences": "7f8bda56bd7c1020",
    "pairs": "ac13c9826dc331a5",
    "word_pairs": "d17a649b54a4a17a",
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_never_change(kind):
    """A difference here changes every run: give `examples.FORMAT` a new number with the new goldens."""
    numbers = (np.arange(4000) * 7919 % 487 + 6).tolist()
    cuts = [0, *(np.cumsum(np.arange(500) % 13 + 1)).tolist()]
    sentences = [numbers[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if b <= len(numbers)]
    documents = [sentences[i : i + 2 + i % 7] for i in range(0, len(sentences), 9)]
    flags = [[token % 3 > 0 for sentence in document for token in sentence] for document in documents]
    data = dataset(InMemoryCorpus(documents, 500, shards=2, word_starts=flags), kind)
    epoch = -(-data.rows_per_epoch(0) // ROWS)
    assert digest(data.batch(0) | {"next epoch": data.batch(epoch)["tokens"]}) == GOLDEN[kind]


def test_row_counts_are_kept_between_runs(corpus, tmp_path):
    first = dataset(corpus, "documents", cache_dir=tmp_path).rows_per_epoch(0)
    (kept,) = tmp_path.iterdir()
    again = dataset(corpus, "documents", cache_dir=tmp_path)
    assert again.rows_per_epoch(3) == again.rows_per_epoch(0) == first and list(tmp_path.iterdir()) == [kept]
    dataset(corpus, "causal", cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "causal rows are others and have a file of their own"


# ---------------------------------------------------------------- form


def check_segments(batch: dict[str, np.ndarray], row: int, sizes: list[int]) -> None:
    """Ids 1, 2, ..., padding 0 at the end, positions from 0 in each."""
    padding = T - sum(sizes)
    numbers = [number for number, size in enumerate(sizes, start=1) for _ in range(size)]
    assert batch["segments"][row].tolist() == numbers + [0] * padding
    assert batch["positions"][row].tolist()[: sum(sizes)] == [p for size in sizes for p in range(size)]
    assert 0 <= batch["positions"][row].min() and batch["positions"][row].max() < T


@pytest.mark.parametrize("kind", ["documents", "sentences"])
def test_documents_are_laid_out_one_after_another(corpus, kind):
    batch, described = an_epoch(dataset(corpus, kind))
    several = 0
    for row, documents in enumerate(described):
        pieces = [[SPECIAL.cls, *stored(corpus, *document), SPECIAL.sep] for document in documents]
        tokens = [token for piece in pieces for token in piece]
        assert restored(batch, row) == tokens + [SPECIAL.pad] * (T - len(tokens))
        check_segments(batch, row, [len(piece) for piece in pieces])
        several += len(pieces) > 1
    assert several > len(described) / 3
    assert all(value.dtype == (np.float32 if name.endswith("weights") else np.int32) for name, value in batch.items())


@pytest.mark.parametrize("kind", ["causal", "causal_sentences"])
def test_causal_documents_predict_themselves_and_their_end(corpus, kind):
    batch, described = an_epoch(dataset(corpus, kind))
    assert set(batch) == {"tokens", "targets", "positions", "segments", "weights"}
    for row, documents in enumerate(described):
        targets = [stored(corpus, *document) for document in documents]
        inputs = [
            [SPECIAL.eot, *target[:-1]] if first == 0 else stored(corpus, shard, document, first - 1, stop - 1)
            for (shard, document, first, stop), target in zip(documents, targets, strict=True)
        ]
        for name, pieces in (("tokens", inputs), ("targets", targets)):
            flat = [token for piece in pieces for token in piece]
            assert batch[name][row].tolist() == flat + [SPECIAL.pad] * (T - len(flat))
        check_segments(batch, row, [len(target) for target in targets])
    np.testing.assert_array_equal(batch["weights"], (batch["segments"] > 0).astype(np.float32))
    spans = [corpus.document_spans(*row) for row in corpus.split_documents("train")]
    lengths = np.concatenate([ends - starts for starts, ends in spans])
    assert batch["weights"].sum() == sum(lengths) + len(lengths), "every token and every end is predicted once"
    assert (batch["targets"] == SPECIAL.eot).sum() == len(lengths)


@pytest.mark.parametrize("masking", [None, Masking()], ids=["causal", "masked"])
def test_documents_of_limited_rows(corpus, masking):
    """No row holds more pieces than allowed, ids ascend to the padding, and nothing is lost."""
    made = [
        Dataset(corpus, PackedDocuments(max_segments=most), masking, sequence_length=T, batch_size=ROWS, seed=3)
        for most in (None, 2)
    ]
    free, limited = (an_epoch(data)[0]["segments"] for data in made)
    assert free.max() > 2 == limited.max()
    before, after = limited[:, :-1], limited[:, 1:]
    assert ((after == before) | (after == before + 1) | (after == 0)).all() and (limited[:, 0] == 1).all()
    assert (limited > 0).sum() == (free > 0).sum()
    assert identity(PackedDocuments()) != identity(PackedDocuments(max_segments=2))


@pytest.mark.parametrize("kind", ["pairs", "word_pairs"])
def test_pairs_have_their_own_labels(corpus, kind):
    data = dataset(corpus, kind)
    batch, described = an_epoch(data)
    k = data.examples.max_segments
    assert all(batch[name].shape[1] == k for name in ("next_labels", "next_weights", "cls_positions"))
    most = 0
    for row, documents in enumerate(described):
        pairs = list(zip(documents[::2], documents[1::2], strict=True))
        sides = [(stored(corpus, *a), stored(corpus, *b)) for a, b in pairs]
        pieces = [[SPECIAL.cls, *a, SPECIAL.sep, *b, SPECIAL.sep] for a, b in sides]
        tokens = [token for piece in pieces for token in piece]
        padding = [0] * (T - len(tokens))
        assert restored(batch, row) == tokens + padding
        assert (
            batch["types"][row].tolist()
            == [t for a, b in sides for t in [0] * (len(a) + 2) + [1] * (len(b) + 1)] + padding
        )
        check_segments(batch, row, [len(piece) for piece in pieces])
        unused = [0] * (k - len(pairs))
        assert batch["next_labels"][row].tolist() == [int(a[:2] != b[:2]) for a, b in pairs] + unused
        assert batch["next_weights"][row].tolist() == [1] * len(pairs) + unused
        begins = np.cumsum([0, *map(len, pieces)])[:-1].tolist()
        assert batch["cls_positions"][row].tolist() == begins + unused
        most = max(most, len(pairs))
    assert most == 3 if k == 3 else most > 3
    assert 0.4 < batch["next_labels"].sum() / batch["next_weights"].sum() < 0.9


def test_packed_pairs_are_the_pairs_of_plain_rows(corpus):
    """The same pairs in the same epoch, only several in a row."""
    plain = Dataset(corpus, SentencePairs(short_fraction=0.5), Masking(), sequence_length=T, batch_size=ROWS, seed=3)
    mine, theirs = an_epoch(dataset(corpus, "pairs")), an_epoch(plain)
    pairs = [(a, b) for row in mine[1] for a, b in zip(row[::2], row[1::2], strict=True)]
    assert sorted(pairs) == sorted((a, b) for a, b in theirs[1])
    assert mine[0]["next_labels"].sum() == theirs[0]["next_labels"].sum()


@pytest.mark.parametrize("kind", ["documents", "causal", "sentences", "causal_sentences"])
def test_every_document_is_used_exactly_once_an_epoch(corpus, kind):
    """Also the one of a single token, and those of many rows; their pieces join without a gap."""
    data = dataset(corpus, kind)
    for epoch in (0, 1):
        rows = np.arange(data.rows_per_epoch(epoch))
        starts, lengths = data._rows.spans(epoch, data._rows.order(epoch, rows))
        read = np.sort(np.concatenate([np.arange(s, s + n) for s, n in zip(starts.flat, lengths.flat, strict=True)]))
        documents = [corpus.document_spans(*row) for row in corpus.split_documents("train")]
        ends = int(kind.startswith("causal"))
        wanted = [np.arange(s, e + ends) for row in documents for s, e in zip(*row, strict=True)]
        np.testing.assert_array_equal(read, np.sort(np.concatenate(wanted)))


@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k][1]])
def test_masks_lie_inside_segments(corpus, kind):
    batch, _ = an_epoch(dataset(corpus, kind))
    real = batch["mask_weights"] > 0
    assert (np.take_along_axis(batch["segments"], batch["mask_positions"], 1)[real] > 0).all()
    assert batch["mask_labels"][real].min() > 5 and real.any(1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_sees_every_row_once(corpus, kind):
    data = dataset(corpus, kind, split="held_out")
    last = data.eval_batch(data.eval_batches() - 1)
    beyond = np.arange(ROWS) >= data.eval_rows() - (data.eval_batches() - 1) * ROWS
    for name, value in last.items():
        if name.endswith("weights") or name == "segments":
            assert not value[beyond].any() and value[~beyond].any()
    if kind == "causal":
        total = sum(data.eval_batch(i)["weights"].sum() for i in range(data.eval_batches()))
        assert total == sum(stop - start for _, start, stop in corpus.split_tokens("held_out"))


# ---------------------------------------------------------------- refusals


def test_one_sentence_documents_are_refused_for_pairs():
    corpus = InMemoryCorpus([[[7] * 20]] * 40, 500)
    with pytest.raises(DataError, match="all 40 documents of the train split have one.*packed_documents"):
        dataset(corpus, "pairs")
    assert dataset(corpus, "documents").rows_per_epoch() == 20


def test_causal_packing_needs_a_token_for_the_end(make_corpus):
    corpus = make_corpus(60, special=SpecialIds(pad=0))
    with pytest.raises(ConfigError, match="packed_documents.*no eot"):
        dataset(corpus, "causal")
    only_eot = make_corpus(60, special=SpecialIds(eot=5))
    assert dataset(only_eot, "causal").batch(0)["tokens"].shape == (ROWS, T)
    with pytest.raises(ConfigError, match="packed_documents.*no pad, cls, sep, mask"):
        dataset(only_eot, "documents")


def test_empty_documents_are_left_out():
    corpus = InMemoryCorpus([[[7] * 30], [], [[8] * 30], [[]], [[9]]] * 9, 500)
    for kind in ("documents", "causal", "causal_sentences", "sentences"):
        batch, described = an_epoch(dataset(corpus, kind))
        assert sorted({document % 5 for row in described for _, document, *_ in row}) == [0, 2, 4]
        assert sum(map(len, described)) == 27 and batch["segments"].max(1).sum() == 27
