"""What the data benchmark is measured against: Hugging Face's collators, and Grain working record by record.

All start from rows that are tokenised, cut to length and in memory, so no peer pays for reading; ours reads its corpus.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from bertgpt_jax.batches.masking import Masking, MaskTables
from bertgpt_jax.benchmarks.harness import Side


@dataclasses.dataclass(frozen=True)
class Rows:
    """Unmasked rows.

    Attributes:
        tokens: int32[R, T], [CLS] and [SEP] included.
        special: bool[R, T], what is never predicted.
        starts_word: bool[R, T].
    """

    tokens: np.ndarray
    special: np.ndarray
    starts_word: np.ndarray


def turns(rows: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows, round and round."""
    while True:
        for begin in range(0, rows - size + 1, size):
            yield slice(begin, begin + size)


# ---------------------------------------------------------------- Hugging Face


def collator_side(name: str, rows: Rows, vocabulary: Path, size: int, batches: int, **settings: Any) -> Side:
    """`DataCollatorForLanguageModeling` over features as `datasets` returns them: dicts of lists.

    Args:
        vocabulary: the `vocab.txt` of the rows.
        size, batches: rows of a batch, and batches of a step.
        settings: of the collator (`return_tensors`, `whole_word_mask`).
    """

    def prepare() -> tuple[Callable, list[dict[str, Any]], Iterator[slice]]:
        from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

        with warnings.catch_warnings():  # it says that whole-word masking never replaces by random words
            warnings.simplefilter("ignore")
            collator = DataCollatorForLanguageModeling(BertTokenizerFast(vocab=str(vocabulary)), **settings)
        return collator, features(rows, collator.whole_word_mask), turns(len(rows.tokens), size)

    def step(state: tuple[Callable, list[dict[str, Any]], Iterator[slice]]) -> None:
        collator, rows, chosen = state
        for _ in range(batches):
            collator(rows[next(chosen)])

    return Side(name, prepare, step)


def features(rows: Rows, whole_words: bool) -> list[dict[str, Any]]:
    """A dict of lists a row; with offsets where words matter: to the collator, a gap between tokens begins a word."""
    columns = {"input_ids": rows.tokens.tolist(), "special_tokens_mask": rows.special.astype(int).tolist()}
    if whole_words:
        begin = 2 * np.arange(rows.tokens.shape[1])
        offsets = np.stack([begin + rows.starts_word, np.broadcast_to(begin + 2, rows.tokens.shape)], axis=-1)
        columns["offset_mapping"] = offsets.tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


# ---------------------------------------------------------------- Grain


def grain_side(
    name: str, rows: Rows, masking: Masking, tables: MaskTables, size: int, batches: int, threads: int
) -> Side:
    """A `grain.MapDataset` of records: shuffled, masked one by one with its own generator, batched."""

    def prepare() -> tuple[grain.MapDataset, Iterator[int]]:
        width = masking.predictions(rows.tokens.shape[1])
        source = grain.MapDataset.source(list(rows.tokens)).seed(1).shuffle().repeat()
        return source.random_map(MaskRecord(masking, tables, width)).batch(size), itertools.count(0, batches)

    def step(state: tuple[grain.MapDataset, Iterator[int]]) -> None:
        pipeline, first = state
        begin = next(first)
        # exactly the batches of this step: nothing is read ahead that nobody waits for
        chosen = pipeline[begin : begin + batches]
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, batches))
        for _ in chosen.to_iter_dataset(options):
            pass

    return Side(name, prepare, step)


@dataclasses.dataclass(frozen=True)
class MaskRecord(grain.transforms.RandomMap):
    """The arrays of one masked record, by the rules of `batches.masking`.

    Attributes:
        width: P, the predictions a record has room for.
    """

    masking: Masking
    tables: MaskTables
    width: int

    def random_map(self, element: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """tokens int32[T] to `tokens`, `positions`, `segments` [T], `mask_positions`, `mask_labels`, `mask_weights`."""
        masking, length = self.masking, len(element)
        candidates = np.flatnonzero(~self.tables.special[element])
        wanted = min(max(round(masking.rate * length), 1), self.width, len(candidates))
        places = np.sort(rng.permutation(candidates)[:wanted])
        labels, action = element[places], rng.random(wanted)
        drawn = self.tables.replacements[rng.integers(0, len(self.tables.replacements), wanted)]
        seen = np.where(action < masking.mask_fraction + masking.random_fraction, drawn, labels)
        tokens = element.copy()
        tokens[places] = np.where(action < masking.mask_fraction, self.tables.mask, seen)
        padded = np.zeros((2, self.width), np.int32)
        padded[:, :wanted] = places, labels
        return {
            "tokens": tokens,
            "positions": np.arange(length, dtype=np.int32),
            "segments": np.ones(length, np.int32),
            "mask_positions": padded[0],
            "mask_labels": padded[1],
            "mask_weights": (np.arange(self.width) < wanted).astype(np.float32),
        }
