"""The arrays of packed rows: segment ids 1, 2, ... in each row (padding 0), positions from 0 in each segment."""

from __future__ import annotations

import numpy as np

from bertgpt_jax.batches.packing import Segments
from bertgpt_jax.corpus.view import WORD_START, Corpus, ragged_index


def layout(segments: Segments, cost: np.ndarray, sequence_length: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Where each segment of `cost` slots (int64[S]) begins in the flattened rows, int64[S]; and the rows' layout.

    Returns:
        slots, and `segments`, `positions` int32[R, T]. What is left of a row counts as a segment of id 0.
    """
    rows, length = segments.rows, sequence_length
    counts = np.bincount(segments.row, minlength=rows)
    mine = np.arange(len(cost)) + segments.row
    sizes, numbers = np.zeros(len(cost) + rows, np.int64), np.zeros(len(cost) + rows, np.int32)
    sizes[mine], numbers[mine] = cost, segments.number
    edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(cost)])
    last = np.cumsum(counts)
    sizes[last + np.arange(rows)] = length - (edges[last] - edges[last - counts])
    begin = np.cumsum(sizes) - sizes
    positions = np.arange(rows * length, dtype=np.int32) - np.repeat(begin.astype(np.int32), sizes)
    arrays = {"segments": np.repeat(numbers, sizes), "positions": positions}
    return begin[mine], {name: value.reshape(rows, length) for name, value in arrays.items()}


def document_arrays(
    corpus: Corpus, segments: Segments, sequence_length: int, words: bool
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Packed documents before masking, each [CLS] + piece + [SEP]; and word starts bool[R, T] if `words`.

    Returns:
        `tokens`, `positions`, `segments` int32[R, T].
    """
    start, length = segments.start[:, 0], segments.length[:, 0]
    slot, arrays = layout(segments, length + 2, sequence_length)
    tokens = np.full(segments.rows * sequence_length, corpus.special.pad, np.int32)
    content = ragged_index(slot + 1, length)
    tokens[content] = corpus.gather(start, length)
    tokens[slot], tokens[slot + length + 1] = corpus.special.cls, corpus.special.sep
    arrays["tokens"] = tokens.reshape(-1, sequence_length)
    return arrays, _word_starts(corpus, segments, content, sequence_length) if words else None


def pair_arrays(
    corpus: Corpus, segments: Segments, sequence_length: int, max_segments: int, words: bool
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Packed pairs before masking, each [CLS] A [SEP] B [SEP]; and word starts bool[R, T] if `words`.

    Returns:
        `tokens`, `positions`, `segments`, `types` (1 on B and its [SEP]) int32[R, T]; and by segment, up to K =
        `max_segments` of them: `next_labels` (1 = random), `cls_positions` int32[R, K], `next_weights` float32[R, K].
    """
    special, (a, b) = corpus.special, segments.length.T
    slot, arrays = layout(segments, a + b + 3, sequence_length)
    b_slot = slot + a + 2
    tokens = np.full(segments.rows * sequence_length, special.pad, np.int32)
    content = ragged_index(np.stack([slot + 1, b_slot], axis=1).reshape(-1), segments.length.reshape(-1))
    tokens[content] = corpus.gather(segments.start.reshape(-1), segments.length.reshape(-1))
    tokens[slot], tokens[b_slot - 1], tokens[b_slot + b] = special.cls, special.sep, special.sep
    types = np.zeros_like(tokens)
    types[ragged_index(b_slot, b + 1)] = 1
    arrays |= {"tokens": tokens.reshape(-1, sequence_length), "types": types.reshape(-1, sequence_length)}
    by_segment = segments.row, segments.number - 1
    values = {"next_labels": segments.label, "cls_positions": slot - sequence_length * segments.row, "next_weights": 1}
    for name, value in values.items():
        arrays[name] = np.zeros((segments.rows, max_segments), np.float32 if name == "next_weights" else np.int32)
        arrays[name][by_segment] = value
    return arrays, _word_starts(corpus, segments, content, sequence_length) if words else None


def causal_document_arrays(corpus: Corpus, segments: Segments, sequence_length: int) -> dict[str, np.ndarray]:
    """Packed documents for next-token prediction: a segment's targets are its piece, its first input what precedes it.

    That is the end-of-document token where the piece begins its document, as GPT-2 samples without a prompt.

    Returns:
        `tokens`, `targets`, `positions`, `segments` int32[R, T]; `weights` float32[R, T], 1 but on padding.
    """
    start, length = segments.start[:, 0], segments.length[:, 0]
    slot, arrays = layout(segments, length, sequence_length)
    stored = corpus.gather(start, length)
    before = np.empty_like(stored)
    before[1:] = stored[:-1]
    first, inside = np.cumsum(length) - length, np.flatnonzero(~segments.label)
    before[first] = corpus.special.eot
    before[first[inside]] = corpus.gather(start[inside] - 1, np.ones(len(inside), np.int64))
    content = ragged_index(slot, length)
    for name, values in (("tokens", before), ("targets", stored)):
        flat = np.full(segments.rows * sequence_length, corpus.special.pad or 0, np.int32)
        flat[content] = values
        arrays[name] = flat.reshape(-1, sequence_length)
    return arrays | {"weights": (arrays["segments"] > 0).astype(np.float32)}


def _word_starts(corpus: Corpus, segments: Segments, content: np.ndarray, sequence_length: int) -> np.ndarray:
    """bool[R, T]: the slots whose token begins a word; `content` are the slots of stored tokens, flattened."""
    starts = np.zeros(segments.rows * sequence_length, bool)
    starts[content] = corpus.gather_flags(segments.start.reshape(-1), segments.length.reshape(-1)) & WORD_START
    return starts.reshape(-1, sequence_length)
