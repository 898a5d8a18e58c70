"""Small corpora made of lists."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bertgpt_jax.corpus.view import InMemoryCorpus

VOCAB = 500


def _documents(rng: np.random.Generator, count: int, sentences: float, words: float) -> list[list[list[int]]]:
    sizes = np.maximum(rng.lognormal(np.log(sentences), 0.7, count).astype(int), 1)
    return [
        [rng.integers(6, VOCAB, max(int(n), 1)).tolist() for n in rng.lognormal(np.log(words), 0.6, size)]
        for size in sizes
    ]


@pytest.fixture(scope="session")
def make_corpus() -> Callable[..., InMemoryCorpus]:
    """make_corpus(documents, held_out=..., ...): sizes are log-normal, sentences with `words` tokens in the median."""

    def make(
        documents: int,
        seed: int = 0,
        held_out: int = 0,
        shards: int = 1,
        sentences: float = 8,
        words: float = 12,
        whole_words: bool = False,
        **more,
    ) -> InMemoryCorpus:
        rng = np.random.default_rng(seed)
        train, held = (_documents(rng, n, sentences, words) for n in (documents, held_out))
        flags = None
        if whole_words:
            flags = [(rng.random(sum(map(len, document))) < 0.6).tolist() for document in [*train, *held]]
        return InMemoryCorpus(train, VOCAB, held_out=held, shards=shards, word_starts=flags, **more)

    return make
