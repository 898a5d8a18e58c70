"""Order and content of batches are the same for any number of processes and threads, and after any interruption.

The processes are simulated: each builds the rows that its devices hold. Real ones are in `tests/faults`.
"""

from __future__ import annotations

import hashlib
import typing
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.examples import Batch, Examples
from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.mixture import Mixture, parts_of
from bertgpt_jax.batches.packing import PackedDocuments, PackedPairs
from bertgpt_jax.batches.pairs import SentencePairs
from bertgpt_jax.batches.pipeline import prefetch
from bertgpt_jax.batches.sentences import DocSentences, FullSentences
from bertgpt_jax.batches.streams import ContiguousStreams
from bertgpt_jax.batches.windows import FullDocuments, Windows
from bertgpt_jax.corpus.view import InMemoryCorpus

ROWS, LENGTH, BATCHES = 8, 24, 1000
MASKED, WORDS = Masking(), Masking(whole_word=True)
KINDS = {
    "windows": (Windows(), None),
    "contiguous_streams": (ContiguousStreams(), None),
    "packed_causal": (PackedDocuments(), None),
    "packed_documents": (PackedDocuments(), MASKED),
    "full_documents": (FullDocuments(), MASKED),
    "whole_words": (FullDocuments(), WORDS),
    "full_sentences": (FullSentences(), MASKED),
    "doc_sentences": (DocSentences(), MASKED),
    "sentence_pairs": (SentencePairs(), MASKED),
    "sentence_order": (SentencePairs(task="sentence_order"), Masking(number="stochastic", spans=3)),
    "packed_pairs": (PackedPairs(), WORDS),
}
MIXED = ("windows", "packed_documents", "sentence_pairs")
EVERYTHING = (*KINDS, *(f"{kind}, mixture" for kind in MIXED))
Data = Dataset | Mixture


@pytest.fixture(scope="module")
def corpora(make_corpus) -> dict[str, InMemoryCorpus]:
    """Three corpora; the first has about 1,400 rows, so that 1,000 batches are several epochs."""
    sizes = {"large": 200, "middle": 60, "small": 20}
    return {name: make_corpus(n, seed=n, shards=2, words=8, whole_words=True) for name, n in sizes.items()}


@pytest.fixture(scope="module")
def few(make_corpus) -> dict[str, InMemoryCorpus]:
    """The same with epochs of some 100 rows."""
    sizes = {"large": 15, "middle": 10, "small": 6}
    return {name: make_corpus(n, seed=n, shards=2, words=8, whole_words=True) for name, n in sizes.items()}


def make(corpora: dict[str, InMemoryCorpus], kind: str) -> Data:
    """What a process makes for itself when it starts."""
    kind, _, mixture = kind.partition(", ")
    examples, masking = KINDS[kind]
    parts = {
        name: Dataset(corpus, examples, masking, sequence_length=LENGTH, batch_size=1 if mixture else ROWS, seed=5)
        for name, corpus in corpora.items()
    }
    if not mixture:
        return parts["large"]
    changes = [(700, [0.1, 0.1, 0.8]), (4100, [0.7, 0.3, 0.0])]
    return Mixture(parts, [0.5, 0.3, 0.2], changes, batch_size=ROWS, seed=5)


def digest(batch: Batch) -> str:
    parts = (name.encode() + batch[name].tobytes() for name in sorted(batch))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def whole(data: Data, count: int) -> list[str]:
    return [digest(data.batch(n)) for n in range(count)]


def from_processes(processes: list[Data], first: int, stop: int) -> Iterator[Batch]:
    """Batches first..stop-1, each process building an equal run of their rows."""
    rows = np.arange(ROWS).reshape(len(processes), -1)
    for n in range(first, stop):
        parts = [process.batch(n, mine) for process, mine in zip(processes, rows, strict=True)]
        yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_every_kind_of_example_is_here() -> None:
    union, *_ = typing.get_args(Examples)
    assert {type(examples) for examples, _ in KINDS.values()} == set(typing.get_args(union))


@pytest.mark.parametrize("kind", EVERYTHING)
def test_any_number_of_processes(corpora, kind: str) -> None:
    expected = whole(make(corpora, kind), 24)
    for count in (2, 4, 8):
        processes = [make(corpora, kind) for _ in range(count)]
        assert [digest(batch) for batch in from_processes(processes, 0, 24)] == expected, f"{count} processes"
    assert len(set(expected)) == 24


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow if i % 4 == 0 else pytest.mark.long) for i, k in enumerate(EVERYTHING)],
)
def test_a_thousand_batches(corpora, kind: str) -> None:
    """From eight threads; and from processes whose number changes at random steps, where new ones take over."""
    expected = [digest(batch) for batch in prefetch(make(corpora, kind).batch, 0, BATCHES, threads=8, buffer=16)]
    assert len(set(expected)) > 150, "streams of few documents repeat themselves"
    rng = np.random.default_rng(len(kind))
    cuts = [0, *sorted(rng.choice(np.arange(1, BATCHES), 7, replace=False).tolist()), BATCHES]
    found: list[str] = []
    for i, (first, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        processes = [make(corpora, kind) for _ in range((1, 2, 1, 4, 1, 8, 1, 2)[i])]
        found += map(digest, from_processes(processes, first, stop))
    assert found == expected


@pytest.mark.parametrize("kind", EVERYTHING)
def test_an_epoch_uses_everything_once_while_processes_come_and_go(few, kind: str) -> None:
    """2 -> 8 -> 2 processes within an epoch."""
    processes = {count: make(few, kind) for count in (2, 8)}
    parts = parts_of(processes[2])
    sizes = {name: part.rows_per_epoch(0) for name, part in parts.items()}
    examples: Counter[tuple[str, int]] = Counter()
    tokens: Counter[tuple[str, int, int, int]] = Counter()
    n = drawn = 0
    while drawn < sum(sizes.values()):
        count = 8 if n % 10 > 4 else 2
        for mine in np.arange(ROWS).reshape(count, -1):
            for row in processes[count].describe(n, mine):
                name = row.get("corpus", "")
                if row["epoch"] == 0:
                    examples[name, row["example"]] += 1
                    for shard, index, begin, end in row["documents"]:
                        tokens.update((name, shard, index, token) for token in range(begin, end))
        n, drawn = n + 1, examples.total()
    assert examples == {(name, example): 1 for name, size in sizes.items() for example in range(size)}
    if kind.startswith(("packed_causal", "packed_documents", "full_sentences")):
        assert set(tokens.values()) == {1}, "every token of every document once"
        assert len({key[:3] for key in tokens}) == sum(int(part.corpus.documents.sum()) for part in parts.values())
