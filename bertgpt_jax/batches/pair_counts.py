"""How many sentence pairs an epoch has, and why more than half of them are random."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bertgpt_jax.batches.index import document_windows
from bertgpt_jax.batches.pairs import SentencePairs, plan_pairs, read_sentences
from bertgpt_jax.corpus.view import Corpus
from bertgpt_jax.errors import DataError


class PairCounts(NamedTuple):
    """Pairs of an epoch (packed or not): all, those with label 1, and those whose chunk had one sentence."""

    pairs: int
    random: int
    alone: int

    @property
    def rate(self) -> float:
        """Share of the pairs with label 1: random next, or swapped."""
        return self.random / self.pairs


def count_pairs(
    corpus: Corpus,
    config: SentencePairs,
    split: str,
    sequence_length: int,
    seed: int = 0,
    epoch: int = 0,
    windows: int | None = None,
) -> PairCounts:
    """Counts the pairs of an epoch, in the first `windows` windows (of about 1,024 documents) if given.

    Raises:
        DataError: there is none.
    """
    counts = np.zeros(3, np.int64)
    for window in document_windows(corpus, split)[:windows]:
        plan = plan_pairs(config, read_sentences(corpus, *map(int, window)), sequence_length, seed, epoch)
        counts += len(plan), int(plan.random.sum()), plan.alone
    if not counts[0]:
        raise DataError(f"the {split} split makes no sentence pair; bring documents of two sentences or more")
    return PairCounts(*counts.tolist())
