"""Masked-language-model targets: how many tokens of a row are predicted, and what the model sees in their place.

The masks of an example depend on (seed, epoch, example index) and its tokens alone, so they are fresh every epoch and
the same on every machine. Rules: google-research/bert `create_pretraining_data.py` (`create_masked_lm_predictions`),
fairseq `mask_tokens_dataset.py` for RoBERTa, Megatron-LM `masked_dataset.py`; `VARIANTS` has their settings by name.
Here special ids are never predicted; the originals spare only [CLS] and [SEP] (fairseq not even those), so
`predict_unknown` is what makes up the difference on their vocabularies.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from bertgpt_jax.batches import bits
from bertgpt_jax.batches.mask_choice import choose_spans, choose_tokens, choose_words, random_order
from bertgpt_jax.config import ADDED, Config
from bertgpt_jax.errors import ConfigError


class Masking(Config):
    """How many tokens are predicted and how they are hidden.

    A name of `VARIANTS` stands for its settings: `objective.masking=roberta`.
    """

    rate: float = Field(0.15, gt=0, lt=1)
    """Share of a row's real tokens, [CLS] and [SEP] counted, that is predicted."""
    number: Annotated[Literal["nearest", "stochastic"], ADDED] = "nearest"
    """From rate * tokens to a whole number: BERT's nearest, and at least one; or floor(. + u), u uniform in [0, 1)."""
    max_predictions: int | None = Field(None, ge=1)
    """At most this many a row (the arrays' width P); None: ceil(rate * sequence length)."""
    mask_fraction: float = Field(0.8, ge=0, le=1)
    """Share of the predicted tokens replaced by [MASK]."""
    random_fraction: float = Field(0.1, ge=0, le=1)
    """Share of the predicted tokens replaced by a random token; what remains is kept as it is."""
    whole_word: bool = False
    """All tokens of a word are chosen together; a word that exceeds the row's number is passed over, as in BERT."""
    spans: Annotated[int, ADDED] = Field(1, ge=1, le=10)
    """Runs of 1 to this many words (tokens, unless `whole_word`) are chosen together, n of them with p(n) ~ 1/n."""
    random_from: Literal["regular", "all"] = "regular"
    """Random tokens are drawn from the ids that are not special (RoBERTa), or from the whole vocabulary (BERT)."""
    predict_unknown: Annotated[bool, ADDED] = False
    """[UNK] may be predicted, as in BERT's script."""
    exclude: Annotated[tuple[Annotated[int, Field(ge=0)], ...], ADDED] = ()
    """Ids that are treated like the special ones: never predicted, and not drawn where `random_from` is regular."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in VARIANTS:
            raise ValueError(f"no masking is called '{value}'; known: {', '.join(VARIANTS)}")
        return VARIANTS[value].model_dump()

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


BERT = Masking(random_from="all", predict_unknown=True)
"""create_pretraining_data.py; with max_predictions=20 at 128 tokens, and whole_word=True for the whole-word models."""
ROBERTA = Masking(number="stochastic")
"""fairseq: the number of masks rounded at random, random tokens uniform over the ids that are not special."""
MEGATRON = Masking(random_from="all", predict_unknown=True, whole_word=True, spans=3)
"""Megatron-LM's `pretrain_bert.py`: runs of 1 to 3 whole words; ALBERT's script has the same defaults."""

VARIANTS = {"bert": BERT, "roberta": ROBERTA, "megatron": MEGATRON}
"""Name to settings; to change one of them, write them out."""


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


def mask_tables(masking: Masking, mask_id: int, special: np.ndarray, unknown: int | None = None) -> MaskTables:
    """Tables for a vocabulary with `special` ids (bool[V]), of which `unknown` is [UNK].

    Raises:
        ConfigError: an excluded id that the vocabulary lacks; nothing is left to predict or to draw from.
    """
    ids = np.arange(len(special), dtype=np.int32)
    outside = [i for i in masking.exclude if i >= len(ids)]
    if outside:
        raise ConfigError(f"masking.exclude: id {outside[0]} is outside the vocabulary of {len(ids)}; take it out")
    excluded = np.isin(ids, masking.exclude)
    never = special | excluded
    regular = ids[~never]
    if masking.predict_unknown and unknown is not None:
        never[unknown] = excluded[unknown]
    if never.all() or not len(regular):
        why = f"all {len(ids)} ids of the vocabulary are special"
        if masking.exclude:
            why += f" or among the {len(masking.exclude)} of masking.exclude; exclude fewer"
        raise ConfigError(f"masking: {why}; nothing can be masked")
    return MaskTables(mask_id, never, regular if masking.random_from == "regular" else ids)


def lost_share(masking: Masking, sequence_length: int) -> float:
    """Share of the predictions that `rate` asks for in a full row and `max_predictions` cuts off; 0 if none."""
    asked = masking.rate * sequence_length
    asked = max(1.0, np.rint(asked)) if masking.number == "nearest" else asked
    return float(max(0.0, 1 - masking.predictions(sequence_length) / asked))


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
    wanted = _wanted(masking, seed, epoch, examples, real, width)
    keys = random_order(bits.stream(seed, "mask-choice", epoch), examples, tokens.shape[1])
    if masking.whole_word and word_start is None:
        raise ConfigError("masking.whole_word = true needs the corpus's word-start flags")
    if masking.spans > 1:
        draws = bits.words(bits.stream(seed, "mask-span", epoch), examples, tokens.shape[1])
        chosen = choose_spans(keys, draws, wanted, maskable, word_start if masking.whole_word else None, masking.spans)
    elif masking.whole_word:
        chosen = choose_words(keys, wanted, maskable, word_start)
    else:
        chosen = choose_tokens(keys, wanted, maskable, width)
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


def _wanted(masking: Masking, seed: int, epoch: int, examples: np.ndarray, real: np.ndarray, width: int) -> np.ndarray:
    """int64[R]: the number of predictions of each row, at most `width`."""
    asked = masking.rate * real.sum(1)
    if masking.number == "nearest":
        return np.clip(np.rint(asked).astype(np.int64), 1, width)
    uniform = bits.words(bits.stream(seed, "mask-number", epoch), examples, 1)[:, 0] / 2.0**32
    return np.minimum(np.floor(asked + uniform).astype(np.int64), width)


def _hide(masking: Masking, tables: MaskTables, key: bits.Key, examples: np.ndarray, width: int) -> np.ndarray:
    """int32[R, P]: what each prediction's token is replaced by, decided token by token; -1 keeps it."""
    random = bits.words(key, examples, 2 * width)
    action, draw = random[:, :width], random[:, width:]
    drawn = tables.replacements[bits.below(draw, len(tables.replacements))]
    hidden = np.where(bits.happens(action, masking.mask_fraction + masking.random_fraction), drawn, -1)
    return np.where(bits.happens(action, masking.mask_fraction), tables.mask, hidden).astype(np.int32)
