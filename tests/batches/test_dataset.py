"""batch(n): pure, complete, well formed; evaluation frozen; refusals."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgpt_jax.batches import dataset as dataset_module
from bertgpt_jax.batches import pairs
from bertgpt_jax.batches.dataset import Dataset, documents_of
from bertgpt_jax.batches.examples import FullDocuments, SentencePairs, Windows
from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.corpus.special import TRAINED_IDS, SpecialIds
from bertgpt_jax.corpus.view import InMemoryCorpus
from bertgpt_jax.errors import ConfigError, DataError

KINDS = {
    "windows": (Windows(), None),
    "full_documents": (FullDocuments(), Masking()),
    "whole_words": (FullDocuments(), Masking(whole_word=True)),
    "sentence_pairs": (SentencePairs(), Masking(max_predictions=4)),
    "whole_word_pairs": (SentencePairs(short_fraction=0.5), Masking(whole_word=True)),
}


@pytest.fixture(scope="module")
def corpus(make_corpus) -> InMemoryCorpus:
    return make_corpus(60, held_out=14, shards=3, whole_words=True)


def dataset(corpus, kind: str, **changes) -> Dataset:
    examples, masking = KINDS[kind]
    settings = {"sequence_length": 32, "batch_size": 16, "seed": 3, "debug": True, **changes}
    return Dataset(corpus, examples, masking, **settings)


def digest(batch: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(name.encode() + batch[name].tobytes() for name in sorted(batch))).hexdigest()[:16]


def batches_of_an_epoch(data: Dataset) -> int:
    return -(-data.rows_per_epoch(0) // data.batch_size)


# ---------------------------------------------------------------- purity


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.integers(0, 60), min_size=1, max_size=6), rows=st.lists(st.integers(0, 15), max_size=20))
def test_a_batch_depends_on_its_number_alone(corpus, kind, steps, rows):
    """Whatever was asked before, in whatever order, whole or in part."""
    used = dataset(corpus, kind)
    if kind.endswith("pairs"):
        used._rows._index._plans._capacity = 1  # forgets a window's plan as soon as it needs another
    for n in steps:
        part = used.batch(n, np.array(rows, np.int64))
        whole = dataset(corpus, kind).batch(n)
        assert part.keys() == whole.keys()
        for name, value in part.items():
            np.testing.assert_array_equal(value, whole[name][rows])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_their_masks_in_batches_of_any_size(corpus, kind):
    small, large = dataset(corpus, kind, batch_size=5), dataset(corpus, kind, batch_size=35)
    parts = [small.batch(n) for n in range(14)]
    wholes = [large.batch(n) for n in range(2)]
    for name in wholes[0]:
        np.testing.assert_array_equal(
            np.concatenate([p[name] for p in parts]), np.concatenate([w[name] for w in wholes])
        )


GOLDEN = {
    "windows": "0f985491e18930e6",
    "full_documents": "8bc22b6e7469c4ca",
    "whole_words": "5cd89bd4800713bc",
    "sentence_pairs": "6e0138ef8f9ec3c2",
    "whole_word_pairs": "2ea26a20998734a8",
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_never_change(kind):
    """A difference here changes every run: give `examples.FORMAT` a new number with the new goldens."""
    numbers = (np.arange(4000) * 7919 % 487 + 6).tolist()
    cuts = [0, *(np.cumsum(np.arange(500) % 13 + 1)).tolist()]
    sentences = [numbers[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if b <= len(numbers)]
    documents = [sentences[i : i + 9] for i in range(0, len(sentences), 9)]
    flags = [[token % 3 > 0 for sentence in document for token in sentence] for document in documents]
    data = dataset(InMemoryCorpus(documents, 500, shards=2, word_starts=flags), kind)
    epoch = batches_of_an_epoch(data)
    assert digest(data.batch(0) | {"next epoch": data.batch(epoch)["tokens"]}) == GOLDEN[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_epoch_change_the_order_and_the_fingerprint(corpus, kind):
    a, b = dataset(corpus, kind), dataset(corpus, kind, seed=4)
    assert digest(a.batch(0)) != digest(b.batch(0))
    assert a.fingerprint != b.fingerprint
    assert a.fingerprint == dataset(corpus, kind).fingerprint != dataset(corpus, kind, split="held_out").fingerprint
    assert digest(a.batch(0)) != digest(a.batch(batches_of_an_epoch(a)))


# ---------------------------------------------------------------- completeness


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_an_epoch_is_used_once(corpus, kind):
    data = dataset(corpus, kind)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    n = 0
    while len(seen[2]) < data.batch_size:
        for row in data.describe(n):
            seen[row["epoch"]].append(row["example"])
        n += 1
    for epoch in (0, 1):
        assert sorted(seen[epoch]) == list(range(data.rows_per_epoch(epoch)))
    assert seen[0] != seen[1]
    assert n * data.batch_size / data.rows_per_epoch(0) == data.epoch_of(n) > 2


@pytest.mark.parametrize("kind, gap", [("windows", 1), ("full_documents", 0)])
def test_windows_cover_the_stream_once(corpus, kind, gap):
    """Every token of the split once, but the first (a causal target has one before it) and a tail of each shard."""
    data = dataset(corpus, kind)
    stride = 32 if kind == "windows" else 30
    starts, lengths = data._rows.spans(0, np.arange(data.rows_per_epoch(0)))
    assert (lengths == stride + gap).all()
    targets = np.concatenate([np.arange(s + gap, s + gap + stride) for s in starts[:, 0]])
    assert len(np.unique(targets)) == len(targets)
    missed = sum(stop - start for _, start, stop in corpus.split_tokens("train")) - len(targets)
    assert 0 <= missed < 3 * (stride + gap)


def test_every_document_is_used_every_epoch(corpus):
    data = dataset(corpus, "sentence_pairs")
    for epoch in (0, 1):
        starts, _ = data._rows.spans(epoch, np.arange(data.rows_per_epoch(epoch)))
        first_of = {
            int(s) for shard, lo, hi in corpus.split_documents("train") for s in corpus.document_spans(shard, lo, hi)[0]
        }
        owners = np.searchsorted(sorted(first_of), starts[:, 0], "right")
        assert len(set(owners)) == 60


# ---------------------------------------------------------------- form


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_types(corpus, kind):
    batch = dataset(corpus, kind).batch(1)
    table, width = ["tokens", "positions"], KINDS[kind][1] and KINDS[kind][1].predictions(32)
    shapes = {name: (16, 32) for name in table}
    if kind == "windows":
        shapes |= {"targets": (16, 32), "weights": (16, 32)}
    else:
        shapes |= {"segments": (16, 32)} | {
            name: (16, width) for name in ("mask_positions", "mask_labels", "mask_weights")
        }
    if kind.endswith("pairs"):
        shapes |= {"types": (16, 32), "next_labels": (16,), "next_weights": (16,)}
    assert {name: value.shape for name, value in batch.items()} == shapes
    for name, value in batch.items():
        assert value.dtype == (np.float32 if name.endswith("weights") else np.int32)
        assert value.flags.c_contiguous and value.flags.writeable
    assert (batch["positions"] == np.arange(32)).all()
    assert dataset(corpus, kind).tokens_per_batch == 512


def restored(batch: dict[str, np.ndarray], row: int) -> np.ndarray:
    """The tokens of a row before they were masked."""
    tokens, real = batch["tokens"][row].copy(), batch["mask_weights"][row] > 0
    tokens[batch["mask_positions"][row][real]] = batch["mask_labels"][row][real]
    return tokens


def test_causal_targets_are_the_next_tokens(corpus):
    data = dataset(corpus, "windows")
    batch = data.batch(2)
    assert (batch["weights"] == 1).all()
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert (batch["tokens"] == TRAINED_IDS.eot).any()
    for row, described in enumerate(data.describe(2)):
        shard, document, first, _ = described["documents"][0]
        start = corpus.document_spans(shard, document, document + 1)[0][0] + first
        np.testing.assert_array_equal(batch["tokens"][row], corpus.gather(np.array([start]), np.array([32])))


@pytest.mark.parametrize("kind", ["full_documents", "whole_words"])
def test_full_documents_have_separators_for_terminators(corpus, kind):
    data = dataset(corpus, kind)
    special = TRAINED_IDS
    for n in range(3):
        batch = data.batch(n)
        assert (batch["segments"] == 1).all()
        assert not (batch["tokens"] == special.eot).any()
        for row, described in enumerate(data.describe(n)):
            stream = []
            for shard, document, first, stop in described["documents"]:
                start, end = (int(x[0]) for x in corpus.document_spans(shard, document, document + 1))
                inside = corpus.gather(np.array([start + first]), np.array([min(start + stop, end) - start - first]))
                stream += [*inside.tolist(), *[special.sep] * (start + stop > end)]
            assert restored(batch, row).tolist() == [special.cls, *stream, special.sep]


@pytest.mark.parametrize("kind", ["sentence_pairs", "whole_word_pairs"])
def test_pairs_are_laid_out_as_in_bert(corpus, kind):
    data = dataset(corpus, kind)
    special, labels = TRAINED_IDS, []
    for n in range(4):
        batch = data.batch(n)
        for row, described in enumerate(data.describe(n)):
            assert len(described["documents"]) == 2  # no pair reaches over a terminator
            a, b = (
                corpus.gather(corpus.document_spans(s, d, d + 1)[0] + first, np.array([stop - first])).tolist()
                for s, d, first, stop in described["documents"]
            )
            padding = [special.pad] * (32 - 3 - len(a) - len(b))
            expected = [special.cls, *a, special.sep, *b, special.sep, *padding]
            assert restored(batch, row).tolist() == expected
            assert batch["segments"][row].sum() == 3 + len(a) + len(b)
            assert batch["types"][row].tolist() == [0] * (2 + len(a)) + [1] * (1 + len(b)) + [0] * len(padding)
            same = described["documents"][0][:2] == described["documents"][1][:2]
            assert batch["next_labels"][row] == (not same)
        labels += batch["next_labels"].tolist()
        assert (batch["next_weights"] == 1).all()
    assert 0.4 < np.mean(labels) < 0.8


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "windows"])
def test_masks_leave_specials_and_padding_alone(corpus, kind):
    data = dataset(corpus, kind)
    for n in range(4):
        batch = data.batch(n)
        real = batch["mask_weights"] > 0
        assert batch["mask_labels"][real].min() > 5
        assert (np.take_along_axis(batch["segments"], batch["mask_positions"], 1)[real] == 1).all()
        wanted = np.clip(np.rint(0.15 * batch["segments"].sum(1)), 1, data.masking.predictions(32))
        assert (real.sum(1) <= wanted).all()
        if not data.masking.whole_word:
            assert (real.sum(1) == wanted).all()


def test_whole_words_are_masked_whole(corpus):
    data = dataset(corpus, "whole_words", sequence_length=64)
    for n in range(3):
        batch, spans = data.batch(n), data._rows.spans(0, np.array([r["example"] for r in data.describe(n)]))
        for row in range(16):
            flags = corpus.gather_flags(spans[0][row], spans[1][row]) & 1
            tokens = restored(batch, row)[1:-1]
            chosen = np.zeros(62, bool)
            chosen[batch["mask_positions"][row][batch["mask_weights"][row] > 0] - 1] = True
            inner = (tokens[1:] > 5) & (tokens[:-1] > 5) & (flags[1:] == 0)
            assert (chosen[1:] == chosen[:-1])[inner].all()


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_sees_every_row_once_and_pads_the_last_batch(corpus, kind):
    data = dataset(corpus, kind, split="held_out")
    count = data.eval_batches()
    assert (count - 1) * 16 < data.eval_rows() <= count * 16
    weights = "weights" if kind == "windows" else "mask_weights"
    last = data.eval_batch(count - 1)
    beyond = np.arange(16) >= data.eval_rows() - (count - 1) * 16
    for name, value in last.items():
        assert value.shape == data.eval_batch(0)[name].shape and value.dtype == data.eval_batch(0)[name].dtype
        if name.endswith("weights") or name in ("segments", "next_labels"):
            assert not value[beyond].any()
    assert (last["tokens"][beyond] == TRAINED_IDS.pad).all()
    part = data.eval_batch(count - 1, np.array([15, 0]))
    for name, value in part.items():
        np.testing.assert_array_equal(value, last[name][[15, 0]])
    assert (data.eval_batch(0)[weights].sum(1) > 0).all()
    for beyond_range in (-1, count):
        with pytest.raises(IndexError, match=str(beyond_range)):
            data.eval_batch(beyond_range)


def test_causal_evaluation_scores_the_whole_split(corpus):
    data = dataset(corpus, "windows", split="held_out")
    batches = [data.eval_batch(i) for i in range(data.eval_batches())]
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in batches])
    expected = [corpus.gather(np.array([a + 1]), np.array([b - a - 1])) for _, a, b in corpus.split_tokens("held_out")]
    np.testing.assert_array_equal(targets, np.concatenate(expected))


def test_masked_evaluation_sees_the_whole_split(corpus):
    data = dataset(corpus, "full_documents", split="held_out")
    rows = [
        restored(batch, r)[: batch["segments"][r].sum()][1:-1]
        for batch in map(data.eval_batch, range(data.eval_batches()))
        for r in range(16)
        if batch["segments"][r].any()
    ]
    stream = np.concatenate(
        [corpus.gather(np.array([a]), np.array([b - a])) for _, a, b in corpus.split_tokens("held_out")]
    )
    np.testing.assert_array_equal(np.concatenate(rows), np.where(stream == TRAINED_IDS.eot, TRAINED_IDS.sep, stream))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_frozen(corpus, kind):
    data = dataset(corpus, kind, split="held_out")
    digests = [digest(data.eval_batch(i)) for i in range(data.eval_batches())]
    data.batch(0) if data.rows_per_epoch() >= 16 else None
    other = dataset(corpus, kind, split="held_out", seed=77)
    assert [digest(other.eval_batch(i)) for i in reversed(range(other.eval_batches()))] == digests[::-1]
    assert dataset(corpus, kind, split="held_out", seed=5, batch_size=3).eval_fingerprint() == data.eval_fingerprint()
    assert dataset(corpus, kind, split="train").eval_fingerprint() != data.eval_fingerprint()


# ---------------------------------------------------------------- cache and replay


def test_row_counts_are_planned_once(corpus, tmp_path, monkeypatch):
    first = dataset(corpus, "sentence_pairs", cache_dir=tmp_path)
    expected = digest(first.batch(30))
    planned = []
    plan = pairs.plan_pairs
    monkeypatch.setattr(pairs, "plan_pairs", lambda *a: planned.append(a) or plan(*a))
    again = dataset(corpus, "sentence_pairs", cache_dir=tmp_path, batch_size=8)
    assert again.rows_per_epoch(0) == first.rows_per_epoch(0) and not planned
    assert digest(dataset(corpus, "sentence_pairs", cache_dir=tmp_path).batch(30)) == expected
    other = dataset(corpus, "sentence_pairs", cache_dir=tmp_path, seed=9)
    assert planned and digest(other.batch(30)) != expected


# ---------------------------------------------------------------- refusals


def refused(error, message, corpus, kind="sentence_pairs", **changes):
    with pytest.raises(error) as caught:
        examples, masking = KINDS[kind]
        arguments = {"sequence_length": 32, "batch_size": 16, "masking": masking, **changes}
        Dataset(corpus, examples, **arguments)
    assert "\n" not in str(caught.value)
    for part in message:
        assert part in str(caught.value)


def test_one_sentence_documents_are_refused_for_pairs():
    corpus = InMemoryCorpus([[[7] * 20]] * 40, 500, held_out=[[[7] * 20, [8]]])
    refused(DataError, ["40 documents", "train", "two sentences", "corpus.sentences"], corpus)
    assert dataset(corpus, "full_documents").rows_per_epoch() > 16


@pytest.mark.parametrize(
    "kind, changes, error, message",
    [
        ("windows", {"batch_size": 0}, ConfigError, ["batch_size = 0"]),
        ("windows", {"batch_size": 5000}, DataError, ["fewer than one batch", "batch_size = 5000"]),
        ("sentence_pairs", {"batch_size": 5000}, DataError, ["fewer than one batch", "batch_size = 5000"]),
        ("windows", {"sequence_length": 100_000}, DataError, ["makes 0 rows of 100000 tokens"]),
        ("sentence_pairs", {"sequence_length": 15}, ConfigError, ["sequence_length = 15", "sentence_pairs", "16"]),
        ("full_documents", {"sequence_length": 7}, ConfigError, ["sequence_length = 7", "full_documents"]),
        ("windows", {"masking": Masking()}, ConfigError, ["windows", "no masking"]),
        ("sentence_pairs", {"masking": None}, ConfigError, ["sentence_pairs", "masking"]),
        ("windows", {"split": "dev"}, DataError, ["dev", "train", "held_out"]),
    ],
)
def test_bad_settings(corpus, kind, changes, error, message):
    refused(error, message, corpus, kind, **changes)


def test_an_empty_split_is_refused(make_corpus):
    refused(DataError, ["held_out", "0 of the corpus's 30", "fraction"], make_corpus(30), split="held_out")


@pytest.mark.parametrize("missing", ["pad", "cls", "sep", "mask"])
@pytest.mark.parametrize("kind", ["sentence_pairs", "full_documents"])
def test_a_tokenizer_without_the_special_tokens_is_refused_for_masks(make_corpus, kind, missing):
    ids = {
        name: None if name == missing else getattr(TRAINED_IDS, name) for name in ("pad", "cls", "sep", "mask", "eot")
    }
    corpus = make_corpus(60, special=SpecialIds(**ids))
    refused(ConfigError, [kind, f"no {missing}"], corpus, kind)
    assert dataset(corpus, "windows").batch(0)


def test_the_kind_of_tokenizer_is_named(make_corpus):
    corpus = make_corpus(60, special=SpecialIds(eot=5))
    corpus.tokenizer = type("Tokenizer", (), {"kind": "byte_bpe"})()
    refused(ConfigError, ["byte_bpe", "no pad, cls, sep, mask"], corpus)


def test_debug_finds_ids_outside_the_vocabulary(make_corpus):
    for bad in (500, -1):
        corpus = make_corpus(60)
        corpus._tokens[corpus._tokens > 5] = bad
        with pytest.raises(DataError, match=f"id {bad}.*500"):
            dataset(corpus, "windows").batch(0)
        assert dataset(corpus, "windows", debug=False).batch(0)


def test_numbers_outside_the_range(corpus):
    data = dataset(corpus, "windows")
    with pytest.raises(IndexError, match="-1"):
        data.batch(-1)
    with pytest.raises(IndexError, match="16"):
        data.batch(0, np.array([16]))


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_the_documents_of_a_span(corpus, block: int, monkeypatch: pytest.MonkeyPatch):
    """All of a shard is never asked for, and what is found is what looking at every document finds."""
    monkeypatch.setattr(dataset_module, "_DOCUMENTS_READ", block)
    rng, read = np.random.default_rng(1), []
    spans = corpus.document_spans
    monkeypatch.setattr(corpus, "document_spans", lambda s, lo, hi: read.append(hi - lo) or spans(s, lo, hi))
    for shard in range(corpus.num_shards):
        starts, ends = spans(shard, 0, int(corpus.documents[shard]))
        documents = list(enumerate(zip(starts.tolist(), (ends + 1).tolist(), strict=True)))
        for _ in range(50):
            start, stop = sorted(rng.integers(starts[0], ends[-1] + 2, 2).tolist())
            wanted = [
                (shard, i, max(start, lo) - lo, min(stop, hi) - lo)
                for i, (lo, hi) in documents
                if lo < stop and hi > start
            ]
            assert start == stop or documents_of(corpus, start, stop) == wanted
    assert max(read) <= block
