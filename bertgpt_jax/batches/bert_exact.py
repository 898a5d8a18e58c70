"""BERT's training instances, token for token as google-research/bert `create_pretraining_data.py` (eedf571) makes them.

This is the oracle that `pairs.py` and `masking.py` are compared with, not a way to train: all documents and all
instances are in memory, and everything hangs on one generator, asked in the original's order. That order is:

1. the documents are shuffled;
2. `dupe_factor` times, for each document: whether it is short (`random() < short_seq_prob`, then its target length);
   and for each chunk of sentences: where A ends (if the chunk has two sentences or more), whether B is random (not
   asked for a chunk of one sentence, where it always is), the other document (up to ten tries for a different one) and
   the sentence B starts with, one coin for each token truncated, the order of the candidates for masks, and for each
   masked token what becomes of it;
3. the instances are shuffled.

Python has kept what `random.Random(seed)` draws since 3.2; lower-casing and the classes of characters follow the
Unicode version of the Python that runs this.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pydantic import Field

from bertgpt_jax.config import Config
from bertgpt_jax.corpus.exact_wordpiece import ExactWordPiece
from bertgpt_jax.errors import DataError

Sentence = list[str]
Document = list[Sentence]

_TRIES = 10
"""For a random document that is not the one at hand."""


class ExactSettings(Config):
    """The flags of the original, with its defaults."""

    max_seq_length: int = Field(128, ge=5)
    """[CLS], two [SEP] and two tokens are the least; the original fails below that."""
    max_predictions: int = Field(20, ge=0)
    dupe_factor: int = Field(10, ge=1)
    """How often each document is gone through, with new pairs and masks."""
    short_seq_prob: float = Field(0.1, ge=0, le=1)
    masked_lm_prob: float = Field(0.15, ge=0, le=1)
    whole_word: bool = False
    """Pieces that begin with `##` are masked with the piece before them, even across a [SEP]."""
    seed: int = 12345


class Instance(NamedTuple):
    """One instance; the names are the original's."""

    tokens: list[str]
    segment_ids: list[int]
    is_random_next: bool
    masked_lm_positions: list[int]
    masked_lm_labels: list[str]


def read_exact_documents(lines: Iterable[str], tokenizer: ExactWordPiece) -> list[Document]:
    """A sentence a line, a blank line between documents; sentences and documents without a token are left out.

    Raises:
        DataError: there is no document.
    """
    documents: list[Document] = [[]]
    for line in lines:
        line = line.strip()
        if not line:
            documents.append([])
        elif tokens := tokenizer.tokenize(line):
            documents[-1].append(tokens)
    documents = [document for document in documents if document]
    if not documents:
        raise DataError("the text has no document: write a sentence a line, and a blank line between documents")
    return documents


def exact_instances(
    documents: Sequence[Document], vocabulary: Sequence[str], settings: ExactSettings
) -> list[Instance]:
    """All instances in the order in which the original writes them.

    Args:
        documents: as `read_exact_documents` gives them.
        vocabulary: the different tokens of the vocabulary file, from which random ones are drawn.
    """
    rng = random.Random(settings.seed)
    shuffled = list(documents)
    rng.shuffle(shuffled)
    instances = [
        instance
        for _ in range(settings.dupe_factor)
        for number in range(len(shuffled))
        for instance in _document_instances(shuffled, number, vocabulary, settings, rng)
    ]
    rng.shuffle(instances)
    return instances


def _document_instances(
    documents: list[Document], number: int, vocabulary: Sequence[str], settings: ExactSettings, rng: random.Random
) -> list[Instance]:
    """The instances of one document in one pass (create_instances_from_document)."""
    document, room = documents[number], settings.max_seq_length - 3
    target = rng.randint(2, room) if rng.random() < settings.short_seq_prob else room
    instances = []
    start = 0
    while start < len(document):
        stop, size = start, 0
        while stop < len(document) and size < target:
            size += len(document[stop])
            stop += 1
        middle = start + (rng.randint(1, stop - start - 1) if stop - start > 1 else 1)
        first = _joined(document[start:middle])
        # the coin is not tossed for a single sentence
        is_random = stop - start == 1 or rng.random() < 0.5
        if is_random:
            second = _random_second(documents, number, target - len(first), rng)
            stop = middle  # what B was not made of is put back
        else:
            second = _joined(document[middle:stop])
        _truncate(first, second, room, rng)
        tokens = ["[CLS]", *first, "[SEP]", *second, "[SEP]"]
        segments = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        masked, positions = _mask(tokens, vocabulary, settings, rng)
        labels = [tokens[position] for position in positions]
        instances.append(Instance(masked, segments, is_random, positions, labels))
        start = stop
    return instances


def _joined(sentences: Iterable[Sentence]) -> list[str]:
    return [token for sentence in sentences for token in sentence]


def _random_second(documents: list[Document], number: int, wanted: int, rng: random.Random) -> list[str]:
    """Sentences of another document (this one after ten vain tries) until there are `wanted` tokens; at least one."""
    for _ in range(_TRIES):
        other = rng.randint(0, len(documents) - 1)
        if other != number:
            break
    document = documents[other]
    tokens: list[str] = []
    for sentence in document[rng.randint(0, len(document) - 1) :]:
        tokens += sentence
        if len(tokens) >= wanted:
            break
    return tokens


def _truncate(first: list[str], second: list[str], room: int, rng: random.Random) -> None:
    """Takes tokens from the longer (B if equal), from its front or its back by a coin, until both fit."""
    while len(first) + len(second) > room:
        longer = first if len(first) > len(second) else second
        del longer[0 if rng.random() < 0.5 else -1]


def _mask(
    tokens: list[str], vocabulary: Sequence[str], settings: ExactSettings, rng: random.Random
) -> tuple[list[str], list[int]]:
    """The tokens as the model sees them, and the positions to predict, ascending (create_masked_lm_predictions)."""
    candidates: list[list[int]] = []
    for position, token in enumerate(tokens):
        if token in ("[CLS]", "[SEP]"):
            continue
        if settings.whole_word and candidates and token.startswith("##"):
            candidates[-1].append(position)
        else:
            candidates.append([position])
    rng.shuffle(candidates)
    wanted = min(settings.max_predictions, max(1, round(len(tokens) * settings.masked_lm_prob)))
    seen, chosen = list(tokens), []
    for candidate in candidates:
        if len(chosen) >= wanted:
            break
        if len(chosen) + len(candidate) > wanted:
            continue
        for position in candidate:
            if rng.random() < 0.8:
                seen[position] = "[MASK]"
            elif rng.random() >= 0.5:
                seen[position] = vocabulary[rng.randint(0, len(vocabulary) - 1)]
        chosen += candidate
    return seen, sorted(chosen)
