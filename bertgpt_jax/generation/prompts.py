"""Prompts as ids, checked before anything is compiled."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.errors import DataError, UsageError

_NAMED = 5
"""Unknown words that a message lists."""


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str], allow_unknown: bool = False) -> list[np.ndarray]:
    """Ids of each text.

    Args:
        allow_unknown: lets the unknown token stand for what the vocabulary does not have.

    Raises:
        UsageError: a text is empty. DataError: the vocabulary has no token for a part of it.
    """
    found = []
    for number, text in enumerate(texts, start=1):
        ids = tokenizer.encode(text)
        if not len(ids):
            raise UsageError(
                f"prompt {number} ({text!r}) is empty; give some text, or --unconditional to begin where documents do"
            )
        check_known(tokenizer, text, ids, f"prompt {number}", allow_unknown)
        found.append(ids)
    return found


def check_known(tokenizer: Tokenizer, text: str, ids: np.ndarray, name: str, allow_unknown: bool) -> None:
    """Raises DataError, naming what is unknown, where `ids` of `text` hold the unknown token."""
    unknown = tokenizer.special.unk
    if allow_unknown or unknown is None or unknown not in ids:
        return
    words = [word for word in re.findall(r"\w+|\S", text) if unknown in tokenizer.encode(word)]
    characters = {word: [c for c in word if unknown in tokenizer.encode(c)] for word in words}
    named = list(dict.fromkeys(part for word in words for part in characters[word] or [word]))
    listed = ", ".join(repr(part) for part in named[:_NAMED]) + (", ..." if len(named) > _NAMED else "")
    raise DataError(
        f"{name}: the vocabulary has no tokens for {listed or 'parts of it'}; the model would read "
        f"{tokenizer.token(unknown)} there: change the text, or pass --allow-unknown"
    )


def parse_ids(text: str, vocab_size: int) -> np.ndarray:
    """The ids in `"1 2 3"`.

    Raises:
        UsageError: not numbers, none, or outside the vocabulary.
    """
    words = text.replace(",", " ").split()
    for word in words:
        if not word.isdecimal() or int(word) >= vocab_size:
            raise UsageError(f"--ids '{text}': '{word}' is no id of the vocabulary, 0 to {vocab_size - 1}")
    if not words:
        raise UsageError("--ids: no id in it; give at least one")
    return np.array(words, np.int32)


def document_start(tokenizer: Tokenizer) -> np.ndarray:
    """The ids before the first word of a document: the token that ends the one before.

    Raises:
        UsageError: the vocabulary has none.
    """
    if tokenizer.special.eot is None:
        raise UsageError("--unconditional: this vocabulary has no end-of-document token to begin with; give a prompt")
    return np.array([tokenizer.special.eot], np.int32)
