"""Rows of whole sentences: RoBERTa's FULL-SENTENCES and DOC-SENTENCES (Liu et al. 2019, section 4.2), one piece a row.

fairseq calls them `sample_break_mode` complete and complete_doc: sentences are gathered, in order, as long as the row
holds them. Unlike there, a sentence longer than a row is cut, and in FULL-SENTENCES a row also ends where a window of
about 1,024 documents does, so that any row of any epoch can be found from the lengths of its window alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np

from bertgpt_jax.batches.index import RowIndex, document_windows
from bertgpt_jax.batches.pairs import chain, read_sentences
from bertgpt_jax.config import Config
from bertgpt_jax.corpus.view import Corpus, ragged_index


class FullSentences(Config):
    """Masked language modelling on [CLS] + consecutive whole sentences + [SEP], of one or more documents.

    A [SEP] stands between two documents; they attend to each other, as in RoBERTa. The rest of a row is padding.
    """

    kind: Literal["full_sentences"] = "full_sentences"


class DocSentences(Config):
    """Masked language modelling on [CLS] + consecutive whole sentences of one document + [SEP], and padding.

    RoBERTa made the batch larger where rows are short; here they are padded, or packed: `packed_documents` with
    `cut=sentences` puts the same pieces several in a row.
    """

    kind: Literal["doc_sentences"] = "doc_sentences"


def cut_sentences(
    start: np.ndarray, stop: np.ndarray, document: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of as many consecutive sentences of a document as end within `capacity` tokens of the first's start.

    Args:
        start, stop, document: int64[S], the sentences in order; what is no sentence (terminators) may lie between.

    Returns:
        start, stop, document: int64[P], the pieces; a sentence longer than `capacity` was cut.
    """
    parts = -(-(stop - start) // capacity)
    owner, offset = np.repeat(np.arange(len(start)), parts), capacity * ragged_index(np.zeros_like(parts), parts)
    start = start[owner] + offset
    stop, document = np.minimum(stop[owner], start + capacity), document[owner]
    reach = np.minimum(np.searchsorted(stop, start + capacity, "right"), np.searchsorted(document, document, "right"))
    first = chain(reach)
    return start[first], stop[reach[first] - 1], document[first]


@dataclasses.dataclass(frozen=True)
class SentencePlan:
    """The rows of a window: global start int64[R] and length int32[R]; `tally` counts slots that hold a token."""

    start: np.ndarray
    length: np.ndarray
    tally: int

    def __len__(self) -> int:
        return len(self.start)


def plan_sentences(
    corpus: Corpus, config: FullSentences | DocSentences, window: np.ndarray, sequence_length: int
) -> SentencePlan:
    """The rows of a window of documents (shard, lo, hi)."""
    sentences = read_sentences(corpus, *map(int, window))
    document = sentences.document if isinstance(config, DocSentences) else np.zeros_like(sentences.document)
    stop = sentences.start + sentences.length
    start, stop, _ = cut_sentences(sentences.start, stop, document, sequence_length - 2)
    length = stop - start
    return SentencePlan(sentences.base + start, length.astype(np.int32), int(length.sum() + 2 * len(length)))


class SentenceRows:
    """The rows of whole sentences of a split, the same every epoch, in an order of its own.

    Args:
        name: identifies corpus, settings and seed, for the cache of row counts in `cache_dir`.
    """

    same_every_epoch = True

    def __init__(
        self,
        corpus: Corpus,
        config: FullSentences | DocSentences,
        split: str,
        sequence_length: int,
        seed: int,
        name: str,
        cache_dir: Path | None,
    ):
        windows = document_windows(corpus, split)

        def plan(epoch: int, window: int) -> SentencePlan:
            return plan_sentences(corpus, config, windows[window], sequence_length)

        self._index = RowIndex(len(windows), plan, seed, name, cache_dir, same_every_epoch=True)
        self.count, self.order, self.filled = self._index.count, self._index.order, self._index.tally

    def spans(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Global start and length of the tokens of each row, int64[R, 1]."""
        window, local = self._index.locate(epoch, rows)
        start, length = np.empty((len(rows), 1), np.int64), np.empty((len(rows), 1), np.int64)
        for w in np.unique(window):
            plan, here = self._index.plan(epoch, int(w)), np.flatnonzero(window == w)
            start[here, 0], length[here, 0] = plan.start[local[here]], plan.length[local[here]]
        return start, length
