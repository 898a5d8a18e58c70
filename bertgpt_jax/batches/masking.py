"""Masked-language-model targets: which tokens of a row are predicted, and what the model sees in their place.

The masks of an example depend on (seed, epoch, example index) and its tokens alone, so they are fresh every epoch and
the same on every machine. Rules: google-research/bert `create_pretraining_data.py` (`create_masked_lm_predictions`);
RoBERTa's restriction of random replacements to regular ids is `random_from="regular"`. Special ids, [UNK] among them,
are never predicted (BERT's script spares only [CLS] and [SEP], and so also asks for unknown words).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from bertgpt_jax.batches import bits
from bertgpt_jax.config import Config
from bertgpt_jax.errors import ConfigError

_NEVER = np.uint64(0xFFFFFFFFFFFFFFFF)
"""Sort key of what cannot be chosen."""


class Masking(Config):
    """How many tokens are predicted and how they are hidden."""

    rate: float = Field(0.15, gt=0, lt=1)
    """Share of a row's real tokens, [CLS] and [SEP] counted, that is predicted (at least one token)."""
    max_predictions: int | None = Field(None, ge=1)
    """At most this many a row (the arrays' width P); None: ceil(rate * sequence length)."""
    mask_fraction: float = Field(0.8, ge=0, le=1)
    """Share of the predicted tokens replaced by [MASK]."""
    random_fraction: float = Field(0.1, ge=0, le=1)
    """Share of the predicted tokens replaced by a random token; what remains is kept as it is."""
    whole_word: bool = False
    """All tokens of a word are chosen together; a word that exceeds the row's number is passed over, as in BERT."""
    random_from: Literal["regular", "all"] = "regular"
    """Random tokens are drawn from the ids that are not special (RoBERTa), or from the whole vocabulary (BERT)."""

    @model_validator(mode="after")
    def _fractions(self) -> Masking:
        if self.mask_fraction + self.random_fraction > 1 + 1e-9:
            raise ValueError(
                f"mask_fraction {self.mask_fraction} + random_fraction {self.random_fraction} exceeds 1; "
                "what they leave is the share kept unchanged"
            )
        return self

    def predictions(self, sequence_length: int) -> int:
        """P, the most predictions a row can hold."""
        most = math.ceil(self.rate * sequence_length - 1e-9)
        return min(self.max_predictions or most, sequence_length)


@dataclasses.dataclass(frozen=True)
class MaskTables:
    """What masking knows of a vocabulary.

    Attributes:
        mask: the id of [MASK].
        special: bool[V], ids that are never predicted.
        replacements: int32[K], ids that a random token is drawn from.
    """

    mask: int
    special: np.ndarray
    replacements: np.ndarray


def mask_tables(masking: Masking, mask_id: int, special: np.ndarray) -> MaskTables:
    """Tables for a vocabulary with `special` ids (bool[V]); ConfigError when nothing is left to draw from."""
    ids = np.arange(len(special), dtype=np.int32)
    regular = ids[~special]
    if not len(regular):
        raise ConfigError(f"masking: all {len(special)} ids of the vocabulary are special; nothing can be masked")
    return MaskTables(mask_id, special, regular if masking.random_from == "regular" else ids)


def mask_rows(
    masking: Masking,
    tables: MaskTables,
    seed: int,
    epoch: int,
    examples: np.ndarray,
    tokens: np.ndarray,
    real: np.ndarray,
    word_start: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Chooses and hides the predicted tokens of each row.

    Args:
        examples: int64[R], the index of each row in its epoch.
        tokens: int32[R, T].
        real: bool[R, T], False on padding.
        word_start: bool[R, T], needed for whole words: tokens that begin one.

    Returns:
        `tokens` int32[R, T] with the chosen ones hidden; `mask_positions` int32[R, P] ascending, `mask_labels`
        int32[R, P] (the tokens that stood there), `mask_weights` float32[R, P]; unused slots are zero.
        P = `masking.predictions(T)`.
    """
    width = masking.predictions(tokens.shape[1])
    maskable = real & ~tables.special[tokens]
    wanted = np.clip(np.rint(masking.rate * real.sum(1)).astype(np.int64), 1, width)
    keys = _keys(bits.stream(seed, "mask-choice", epoch), examples, tokens.shape[1])
    if masking.whole_word:
        if word_start is None:
            raise ConfigError("masking.whole_word = true needs the corpus's word-start flags")
        chosen = _choose_words(keys, wanted, maskable, word_start)
    else:
        chosen = _choose_tokens(keys, wanted, maskable, width)
    row, position = np.nonzero(chosen)
    count = chosen.sum(1)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    labels = tokens[row, position]
    hidden = _hide(masking, tables, bits.stream(seed, "mask-action", epoch), examples, width)
    seen = hidden[row, slot]
    tokens = tokens.copy()
    tokens[row, position] = np.where(seen < 0, labels, seen)
    out = {
        "mask_positions": np.zeros((len(tokens), width), np.int32),
        "mask_labels": np.zeros((len(tokens), width), np.int32),
        "mask_weights": np.zeros((len(tokens), width), np.float32),
    }
    out["mask_positions"][row, slot] = position
    out["mask_labels"][row, slot] = labels
    out["mask_weights"][row, slot] = 1
    return {"tokens": tokens, **out}


def _keys(key: bits.Key, examples: np.ndarray, length: int) -> np.ndarray:
    """uint64[R, T]: a random order of each row's positions; the low half is the position, so no two are equal."""
    keys = bits.words(key, examples, length).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(length, dtype=np.uint64)
    return keys


def _choose_tokens(keys: np.ndarray, wanted: np.ndarray, maskable: np.ndarray, width: int) -> np.ndarray:
    """bool[R, T]: the `wanted` maskable positions of each row that come first in the random order."""
    keys = np.where(maskable, keys, _NEVER)
    if width < keys.shape[1]:
        keys = np.partition(keys, width, axis=1)[:, :width]
    keys = np.sort(keys, axis=1)
    row, rank = np.nonzero((np.arange(keys.shape[1]) < wanted[:, None]) & (keys != _NEVER))
    chosen = np.zeros(maskable.shape, bool)
    chosen[row, (keys[row, rank] & np.uint64(0xFFFFFFFF)).astype(np.int64)] = True
    return chosen


def _choose_words(keys: np.ndarray, wanted: np.ndarray, maskable: np.ndarray, word_start: np.ndarray) -> np.ndarray:
    """bool[R, T]: whole words in random order, each taken if the row's number still allows all its tokens."""
    rows, length = maskable.shape
    # a token that may not be chosen parts words: what follows it begins a new one
    after_gap = np.ones_like(maskable)
    after_gap[:, 1:] = ~maskable[:, :-1]
    start = maskable & (word_start | after_gap)
    number = np.cumsum(start, axis=1) - 1
    row_base = length * np.arange(rows)[:, None]
    size = np.bincount((number + row_base)[maskable], minlength=rows * length).reshape(rows, length)
    keys = np.sort(np.where(start, keys, _NEVER), axis=1)
    first = np.where(keys != _NEVER, keys & np.uint64(0xFFFFFFFF), 0).astype(np.int64)
    word = np.take_along_axis(number, first, axis=1)
    # the ranks lead, so that a step of the loop reads consecutive memory; what is no word never fits
    size_by_rank = np.where(keys != _NEVER, np.take_along_axis(size, word, axis=1), length + 1).T.copy()
    taken_by_rank = np.zeros((length, rows), bool)
    left = wanted.copy()
    for fits, this in zip(taken_by_rank, size_by_rank, strict=True):
        np.less_equal(this, left, out=fits)
        left -= this * fits
        if not left.any():
            break
    taken = np.zeros((rows, length), bool)
    rank, row = np.nonzero(taken_by_rank)
    taken[row, word[row, rank]] = True
    return maskable & np.take_along_axis(taken, number.clip(0), axis=1)


def _hide(masking: Masking, tables: MaskTables, key: bits.Key, examples: np.ndarray, width: int) -> np.ndarray:
    """int32[R, P]: what each prediction's token is replaced by, decided token by token; -1 keeps it."""
    random = bits.words(key, examples, 2 * width)
    action, draw = random[:, :width], random[:, width:]
    drawn = tables.replacements[bits.below(draw, len(tables.replacements))]
    hidden = np.where(bits.happens(action, masking.mask_fraction + masking.random_fraction), drawn, -1)
    return np.where(bits.happens(action, masking.mask_fraction), tables.mask, hidden).astype(np.int32)
