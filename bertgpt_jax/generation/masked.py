"""A masked language model's guesses for masks in a text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.errors import UsageError
from bertgpt_jax.generation.prompts import check_known
from bertgpt_jax.models import make_model
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.masks import segment_mask
from bertgpt_jax.shapes import Array, Params, Tokens

MASKS = re.compile(r"\[MASK\]|<mask>")
"""How a mask is written in a text, BERT's way and RoBERTa's; both mean the vocabulary's own."""

COLUMNS = 32
"""Texts are padded to a multiple of this, so that few programs are compiled."""


@dataclasses.dataclass(frozen=True)
class MaskedModel:
    """A BERT or RoBERTa that scores tokens at masks.

    Attributes:
        config: of the model.
        vocab_size: of the tokenizer; rows that pad the table are never a guess.
        dtype: of the computation.
    """

    config: BertConfig
    vocab_size: int
    dtype: str = "float32"

    def check_length(self, length: int) -> None:
        """Raises UsageError where a text of `length` tokens, [CLS] and [SEP] among them, exceeds the context."""
        longest = self.config.max_positions
        if length > longest:
            raise UsageError(
                f"the text has {length:,} tokens, more than the model's context of {longest:,}; shorten it"
            )

    def logits(self, params: Params, tokens_BT: Tokens, lengths_B: Array, at_BP: Array) -> Array:
        """fp32 [B, P, V] at positions `at_BP` of rows of `lengths_B` tokens each, the rest padding."""
        columns_T = jnp.arange(tokens_BT.shape[1])
        positions_BT = jnp.broadcast_to(columns_T, tokens_BT.shape)
        mask = segment_mask((columns_T < lengths_B[:, None]).astype(jnp.int32))
        model = make_model(self.config, ComputeConfig(dtype=self.dtype))
        x_BTD = model.apply({"params": params}, tokens_BT, positions_BT, None, mask, method="encode")
        logits_BPV = model.apply({"params": params}, x_BTD, at_BP, method="masked_logits")
        return logits_BPV[..., : self.vocab_size].astype(jnp.float32)


class Guess(NamedTuple):
    """A token for a mask: its id, its spelling, its probability."""

    id: int
    token: str
    probability: float


def encode_masked(tokenizer: Tokenizer, text: str, allow_unknown: bool = False) -> tuple[np.ndarray, list[int]]:
    """(ids of `[CLS] text [SEP]`, positions of its masks).

    Raises:
        UsageError: there is no mask in it. ConfigError: the vocabulary has no such token. DataError: unknown words.
    """
    special = tokenizer.special
    special.require("cls", "sep", "mask", purpose="filling masks")
    parts = MASKS.split(text)
    if len(parts) == 1:
        raise UsageError(f"{text!r} has no mask; write {tokenizer.token(special.mask)} where a token is to be guessed")
    ids, masks = [special.cls], []
    for number, part in enumerate(parts):
        if number:
            masks.append(len(ids))
            ids.append(special.mask)
        # byte-level pieces carry the space before them: RoBERTa's mask stands for a piece with its space
        part = part.rstrip(" ") if tokenizer.kind == "byte_bpe" and number < len(parts) - 1 else part
        encoded = tokenizer.encode(part)
        check_known(tokenizer, part, encoded, repr(text), allow_unknown)
        ids += encoded.tolist()
    return np.array([*ids, special.sep], np.int32), masks


def fill_masks(
    model: MaskedModel, params: Params, tokenizer: Tokenizer, text: str, top_k: int, allow_unknown: bool = False
) -> list[list[Guess]]:
    """The `top_k` most probable tokens of each mask of `text`, best first; each mask's with the others still masked."""
    ids, masks = encode_masked(tokenizer, text, allow_unknown)
    model.check_length(len(ids))
    probabilities_PV = masked_probabilities(model, params, [ids], [masks])[0]
    best_PK = np.argsort(-probabilities_PV, axis=1, kind="stable")[:, :top_k]
    return [
        [Guess(int(i), tokenizer.token(int(i)), float(row[i])) for i in best]
        for row, best in zip(probabilities_PV, best_PK, strict=True)
    ]


def masked_probabilities(
    model: MaskedModel, params: Params, rows: Sequence[np.ndarray], positions: Sequence[Sequence[int]]
) -> np.ndarray:
    """fp32 [B, P, V]: the distribution over tokens at P positions of every row of ids."""
    tokens_BT, lengths_B = padded(rows)
    at_BP = np.array(positions, np.int32)
    return np.asarray(_probabilities(model, params, tokens_BT, lengths_B, at_BP))


def padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, T], lengths [B]) of rows of ids; T is a multiple of `COLUMNS`, the rest zeros."""
    columns = -(-max(map(len, rows)) // COLUMNS) * COLUMNS
    tokens_BT = np.zeros((len(rows), columns), np.int32)
    for row, ids in zip(tokens_BT, rows, strict=True):
        row[: len(ids)] = ids
    return tokens_BT, np.array([len(ids) for ids in rows], np.int32)


@partial(jax.jit, static_argnums=0)
def _probabilities(model: MaskedModel, params: Params, tokens_BT: Array, lengths_B: Array, at_BP: Array) -> Array:
    return jax.nn.softmax(model.logits(params, tokens_BT, lengths_B, at_BP))
