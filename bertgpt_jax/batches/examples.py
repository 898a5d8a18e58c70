"""What a row is made of, by kind: its rows with random access, and their arrays before masking."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
from pydantic import Field

from bertgpt_jax.batches import packed_arrays
from bertgpt_jax.batches.packing import PackedDocuments, PackedPairs, packed_documents, packed_pairs
from bertgpt_jax.batches.pairs import PairRows, SentencePairs, pair_arrays
from bertgpt_jax.batches.sentences import DocSentences, FullSentences, SentenceRows
from bertgpt_jax.batches.streams import ContiguousStreams, StreamRows
from bertgpt_jax.batches.windows import FixedRows, FullDocuments, Windows, causal_arrays, stream_arrays
from bertgpt_jax.config import fingerprint, identity
from bertgpt_jax.corpus.view import Corpus

Examples = Annotated[
    Windows
    | ContiguousStreams
    | FullDocuments
    | FullSentences
    | DocSentences
    | SentencePairs
    | PackedDocuments
    | PackedPairs,
    Field(discriminator="kind"),
]
"""What a row is made of."""

Batch = dict[str, np.ndarray]

FORMAT = 1
"""Of what a batch is for given settings; a change to any array of any batch needs a new number."""


class Rows(Protocol):
    """The rows of a split: their number in an epoch, their order, and the tokens they read."""

    same_every_epoch: bool

    def count(self, epoch: int) -> int: ...

    def order(self, epoch: int, ranks: np.ndarray) -> np.ndarray: ...

    def spans(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class ExampleMaker:
    """The rows of a split of a corpus, and their arrays.

    Attributes:
        batch_size: rows of a batch; only contiguous streams depend on it.
        causal: next tokens are predicted, not masked ones.
    """

    corpus: Corpus
    examples: Examples
    split: str
    sequence_length: int
    batch_size: int
    causal: bool

    def rows(self, seed: int, partial: bool, cache_dir: Path | None) -> Rows:
        """The rows of the split.

        Args:
            partial: for evaluation: rows with a fixed distance reach to the end of the text.
            cache_dir: where the row counts of planned windows are kept between runs.
        """
        corpus, examples, split, length = self.corpus, self.examples, self.split, self.sequence_length
        # neither masks nor the batch size change which rows there are
        key = [FORMAT, corpus.fingerprint, identity(examples), split, length, seed]
        name = fingerprint([*key, "causal"] if self.causal else key)[:32]
        match examples:
            case PackedPairs():
                return packed_pairs(corpus, examples, split, length, seed, name, cache_dir)
            case PackedDocuments():
                return packed_documents(corpus, examples, split, length, self.causal, seed, name, cache_dir)
            case SentencePairs():
                return PairRows(corpus, examples, split, length, seed, name, cache_dir)
            case FullSentences() | DocSentences():
                return SentenceRows(corpus, examples, split, length, seed, name, cache_dir)
            case ContiguousStreams():
                return StreamRows(corpus, split, length, self.batch_size, seed, partial)
            case FullDocuments():
                return FixedRows(corpus, split, length - 2, length - 2, seed, partial)
            case Windows():
                return FixedRows(corpus, split, length + 1, length, seed, partial)

    def filled(self, source: Rows, epoch: int) -> int:
        """Slots of an epoch's training rows that hold a token, special ones included."""
        whole = isinstance(source, FixedRows | StreamRows)
        return source.count(epoch) * self.sequence_length if whole else source.filled(epoch)

    def arrays(self, source: Rows, epoch: int, rows: np.ndarray, words: bool) -> tuple[Batch, np.ndarray | None]:
        """The arrays of rows before masking; and word starts bool[R, T] if `words`."""
        corpus, length = self.corpus, self.sequence_length
        match self.examples:
            case PackedPairs(max_segments=most):
                return packed_arrays.pair_arrays(corpus, source.segments(epoch, rows), length, most, words)
            case PackedDocuments():
                segments = source.segments(epoch, rows)
                if self.causal:
                    return packed_arrays.causal_document_arrays(corpus, segments, length), None
                return packed_arrays.document_arrays(corpus, segments, length, words)
            case SentencePairs():
                return pair_arrays(corpus, *source.pairs(epoch, rows), length, words)
            case ContiguousStreams():
                arrays = causal_arrays(corpus, *source.spans(epoch, rows), length)
                return arrays | {"resets": source.resets(rows)}, None
            case Windows():
                return causal_arrays(corpus, *source.spans(epoch, rows), length), None
            case FullDocuments() | FullSentences() | DocSentences():
                return stream_arrays(corpus, *source.spans(epoch, rows), length, words)
