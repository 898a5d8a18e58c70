"""Rows at fixed distances through the token stream: causal windows, and masked-LM windows without sentence pairs.

The stream of a split is, shard by shard, its documents with their terminators. Row counts have a closed form, so any
row of any epoch is found by arithmetic, and an epoch's order is a keyed permutation of all rows.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from bertgpt_jax.batches import bits
from bertgpt_jax.config import Config
from bertgpt_jax.corpus.view import WORD_START, Corpus


class Windows(Config):
    """Causal language modelling (GPT-3, section 2.2): T+1 consecutive tokens, the last being the first of the next row.

    A terminator follows each document; windows cross documents and attention is not cut there. Every token but the
    first of a shard is a target once an epoch; the end of a shard that fills no window is left out of training.
    """

    kind: Literal["windows"] = "windows"


class FullDocuments(Config):
    """Masked language modelling without next sentences: [CLS], T-2 consecutive tokens, [SEP].

    Documents follow one another with a [SEP] in place of each terminator and attend to each other, as in RoBERTa's
    FULL-SENTENCES (Liu et al. 2019, section 4.2); unlike there, a row may begin and end inside a sentence, so none is
    padded. `full_sentences` has rows of whole sentences.
    """

    kind: Literal["full_documents"] = "full_documents"


class FixedRows:
    """The rows of a split at a fixed distance.

    Args:
        span: tokens a row reads.
        stride: tokens between the starts of two rows, at most `span`.
        partial: also counts a shorter last row of each shard (evaluation scores every token).
    """

    same_every_epoch = True

    def __init__(self, corpus: Corpus, split: str, span: int, stride: int, seed: int, partial: bool):
        self._span, self._stride, self._seed = span, stride, seed
        parts = np.array([(a, b) for _, a, b in corpus.split_tokens(split)], np.int64).reshape(-1, 2)
        self._start, self._stop = parts[:, 0], parts[:, 1]
        fresh = np.maximum(self._stop - self._start - (span - stride), 0)
        rows = -(-fresh // stride) if partial else fresh // stride
        self._base = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows)])

    def count(self, epoch: int) -> int:
        """Rows of an epoch, the same for all."""
        return int(self._base[-1])

    def order(self, epoch: int, ranks: np.ndarray) -> np.ndarray:
        """The rows that an epoch's order puts at `ranks`."""
        return bits.permuted(bits.stream(self._seed, "row-order", epoch), self.count(epoch), ranks)

    def spans(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Global start and length of the tokens of each row, int64[R, 1]; only a shard's last row may be shorter."""
        part = np.searchsorted(self._base, rows, "right") - 1
        start = self._start[part] + (rows - self._base[part]) * self._stride
        return start[:, None], np.minimum(self._span, self._stop[part] - start)[:, None]


def causal_arrays(
    corpus: Corpus, starts: np.ndarray, lengths: np.ndarray, sequence_length: int
) -> dict[str, np.ndarray]:
    """The arrays of rows of T+1 consecutive tokens.

    Args:
        starts, lengths: int64[R, k], the spans of a row; together at most T+1 tokens.

    Returns:
        `tokens`, `targets` (the next tokens), `positions` int32[R, T]; `weights` float32[R, T], 0 beyond the end.
    """
    window = np.full((len(starts), sequence_length + 1), corpus.special.pad or 0, np.int32)
    column = np.arange(sequence_length + 1)
    tokens, lengths = corpus.gather(starts.reshape(-1), lengths.reshape(-1)), lengths.sum(1, keepdims=True)
    if tokens.size == window.size:
        window[:] = tokens.reshape(window.shape)
    else:
        window[column < lengths] = tokens
    return {
        "tokens": np.ascontiguousarray(window[:, :-1]),
        "positions": positions(len(window), sequence_length),
        "targets": np.ascontiguousarray(window[:, 1:]),
        "weights": (column[1:] < lengths).astype(np.float32),
    }


def stream_arrays(
    corpus: Corpus, starts: np.ndarray, lengths: np.ndarray, sequence_length: int, words: bool
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """`tokens`, `positions`, `segments` int32[R, T] of [CLS] + stream + [SEP]; and word starts bool[R, T] if `words`.

    Args:
        starts, lengths: int64[R, 1], at most T-2 tokens a row.
    """
    special, column = corpus.special, np.arange(sequence_length)
    content = (column >= 1) & (column <= lengths)
    stream = corpus.gather(starts[:, 0], lengths[:, 0])
    tokens = np.full(content.shape, special.pad, np.int32)
    tokens[content] = np.where(stream == special.eot, special.sep, stream)
    tokens[:, 0] = special.cls
    np.put_along_axis(tokens, lengths + 1, special.sep, axis=1)
    word_start = None
    if words:
        word_start = np.zeros(content.shape, bool)
        word_start[content] = corpus.gather_flags(starts[:, 0], lengths[:, 0]) & WORD_START
    segments = (column < lengths + 2).astype(np.int32)
    return {"tokens": tokens, "positions": positions(*tokens.shape), "segments": segments}, word_start


def positions(rows: int, sequence_length: int) -> np.ndarray:
    """int32[R, T]: 0..T-1 in every row."""
    return np.tile(np.arange(sequence_length, dtype=np.int32), (rows, 1))
