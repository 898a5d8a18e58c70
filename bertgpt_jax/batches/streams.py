"""Contiguous streams for models that carry memory from batch to batch (Dai et al. 2019, Transformer-XL, section 3.2).

The split, in the epoch's order of documents, is one stream; it is dealt to B lanes of equal length, and row b of each
batch goes on where row b of the batch before ended. Every row is found by arithmetic over the windows of documents.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from bertgpt_jax.batches import bits
from bertgpt_jax.batches.index import Memo, document_windows
from bertgpt_jax.config import Config
from bertgpt_jax.corpus.view import Corpus


class ContiguousStreams(Config):
    """Causal language modelling with memory: row b of batch n continues row b of batch n-1.

    Documents follow one another with their end-of-document tokens; each epoch takes the windows of about 1,024
    documents in an order of its own. `resets` is 1 in an epoch's first batch, where there is nothing to remember. What
    fills no segment of all lanes, under B * T tokens at the end of the stream, is left out of training.
    """

    kind: Literal["contiguous_streams"] = "contiguous_streams"


class StreamRows:
    """The rows of a split dealt to lanes: row r is segment r // B of lane r % B, in the order of its number.

    Args:
        lanes: B.
        partial: stored order of documents, and segments until the stream's end (evaluation scores every token).
    """

    same_every_epoch = True

    def __init__(self, corpus: Corpus, split: str, sequence_length: int, lanes: int, seed: int, partial: bool):
        self._length, self._lanes, self._seed, self._partial = sequence_length, lanes, seed, partial
        windows = document_windows(corpus, split)
        spans = []
        for shard, lo, hi in corpus.split_documents(split):
            starts, ends = corpus.document_spans(shard, lo, hi)
            mine = windows[(windows[:, 0] == shard)] - lo
            spans.append(np.stack([starts[mine[:, 1]], ends[mine[:, 2] - 1] + 1], axis=1))
        self._windows = np.concatenate(spans)
        self._total = int((self._windows[:, 1] - self._windows[:, 0]).sum())
        step = sequence_length * lanes
        self._segments = -(-(self._total - 1) // step) if partial else (self._total - 1) // step
        self._epochs: Memo[int, tuple[np.ndarray, np.ndarray]] = Memo(4)

    def count(self, epoch: int) -> int:
        """Rows of an epoch, the same for all."""
        return self._segments * self._lanes

    def order(self, epoch: int, ranks: np.ndarray) -> np.ndarray:
        """`ranks`: lanes go on in the order of the rows."""
        return np.asarray(ranks, np.int64)

    def resets(self, rows: np.ndarray) -> np.ndarray:
        """int32[R]: 1 where a lane begins."""
        return (rows < self._lanes).astype(np.int32)

    def spans(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Global start and length int64[R, k] of the T+1 tokens of each row, cut where windows meet."""
        base, starts = self._epochs.get(epoch, lambda: self._order(epoch))
        segment, lane = np.divmod(np.asarray(rows, np.int64), self._lanes)
        begin = np.minimum((lane * self._segments + segment) * self._length, self._total)[:, None]
        end = np.minimum(begin + self._length + 1, self._total)
        first = np.minimum(np.searchsorted(base, begin, "right") - 1, len(starts) - 1)
        last = np.maximum(np.searchsorted(base, end, "left") - 1, first)
        part = first + np.arange(int((last - first).max(initial=0)) + 1)
        inside, part = part <= last, np.minimum(part, len(starts) - 1)
        lo, hi = np.maximum(base[part], begin), np.minimum(base[part + 1], end)
        return starts[part] + lo - base[part], np.where(inside, hi - lo, 0)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each window begins in the epoch's stream, int64[W+1], and its global start, int64[W]."""
        chosen = np.arange(len(self._windows))
        if not self._partial:
            chosen = bits.permuted(bits.stream(self._seed, "stream-order", epoch), len(chosen), chosen)
        windows = self._windows[chosen]
        sizes = np.cumsum(windows[:, 1] - windows[:, 0])
        return np.concatenate([np.zeros(1, np.int64), sizes]), windows[:, 0]
