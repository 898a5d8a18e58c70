"""What a dataset refuses: settings that contradict one another, empty splits, ids outside the vocabulary."""

from __future__ import annotations

import functools
import logging

import numpy as np

from bertgpt_jax.batches.examples import Examples
from bertgpt_jax.batches.masking import Masking, lost_share
from bertgpt_jax.batches.packing import PackedDocuments
from bertgpt_jax.batches.pairs import MIN_LENGTH, SentencePairs
from bertgpt_jax.batches.streams import ContiguousStreams
from bertgpt_jax.batches.windows import Windows
from bertgpt_jax.corpus.view import Corpus
from bertgpt_jax.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def check_rows(rows: np.ndarray | None, batch_size: int) -> np.ndarray:
    """int64[R]: the rows of a batch that are asked for, all if None."""
    if rows is None:
        return np.arange(batch_size)
    rows = np.asarray(rows, np.int64)
    if rows.size and not (0 <= rows.min() and rows.max() < batch_size):
        raise IndexError(f"rows {rows.min()}..{rows.max()} of a batch of {batch_size}")
    return rows


def check_settings(
    corpus: Corpus,
    examples: Examples,
    masking: Masking | None,
    sequence_length: int,
    batch_size: int,
) -> None:
    """ConfigError if settings contradict one another, or masks ask for tokens that the vocabulary lacks."""
    kind = examples.kind
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size}: must be at least 1")
    least = MIN_LENGTH if isinstance(examples, SentencePairs) else 8
    if sequence_length < least:
        raise ConfigError(f"sequence_length = {sequence_length}: '{kind}' needs at least {least}")
    if isinstance(examples, PackedDocuments) and masking is None:
        return corpus.special.require("eot", purpose=f"examples '{kind}' without masking")
    if isinstance(examples, Windows | ContiguousStreams):
        if masking is not None:
            raise ConfigError(
                f"examples '{kind}' are for causal language modelling and take no masking: use full_documents"
            )
        return
    if masking is None:
        raise ConfigError(f"examples '{kind}' need masking; for causal language modelling use windows")
    purpose = f"examples '{kind}'"
    if None in (corpus.special.pad, corpus.special.cls, corpus.special.sep, corpus.special.mask):
        tokenizer = getattr(corpus, "tokenizer", None)  # a corpus made of lists has none
        purpose += f" with the {tokenizer.kind} tokenizer" if tokenizer is not None else ""
    corpus.special.require("pad", "cls", "sep", "mask", purpose=purpose)


@functools.cache
def warn_of_lost_predictions(masking: Masking, sequence_length: int) -> None:
    """Logs once, for the same settings, that `max_predictions` is too small for the rate."""
    lost = lost_share(masking, sequence_length)
    if lost:
        log.warning(
            "masking.max_predictions = %d cuts %.0f%% of the predictions of a full row: masking.rate = %g asks for %d "
            "of %d tokens; raise it, or lower the rate",
            masking.max_predictions,
            100 * lost,
            masking.rate,
            round(masking.rate * sequence_length),
            sequence_length,
        )


def check_split(corpus: Corpus, split: str) -> None:
    """DataError if a split is empty."""
    if not corpus.split_tokens(split):
        advice = "raise corpus.held_out.fraction or bring more text" if split == "held_out" else "bring text"
        raise DataError(f"the {split} split has 0 of the corpus's {int(corpus.documents.sum())} documents; {advice}")


def check_apart(kind: str, what: str) -> None:
    """ConfigError for examples whose rows continue those of the batch before, where batches are put together anew."""
    if kind == "contiguous_streams":
        raise ConfigError(f"examples '{kind}' go on from batch to batch, which {what} would break; drop one of the two")


def check_ids(arrays: dict[str, np.ndarray], vocab_size: int) -> None:
    """DataError if a batch holds an id that the model's embedding has no row for."""
    for name in ("tokens", "targets", "mask_labels"):
        ids = arrays.get(name, np.zeros(0, np.int32))
        bad = ids[(ids < 0) | (ids >= vocab_size)]
        if len(bad):
            raise DataError(f"{name} holds id {bad[0]}, outside the vocabulary of {vocab_size}")
