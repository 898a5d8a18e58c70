"""One token a character."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from bertgpt_jax.corpus.special import SPECIAL_TOKENS, TRAINED_IDS
from bertgpt_jax.corpus.tokenizer import CONFIG_FILE, UNKNOWN_SPELLING, Tokenizer, config_file, piece_classes, read_file
from bertgpt_jax.errors import DataError


class Characters(Tokenizer):
    """Ids 0..5 are our special tokens, then the characters in code point order; others are [UNK]."""

    kind = "characters"

    def __init__(self, characters: str):
        self._characters = "".join(sorted(set(characters)))
        self.special = TRAINED_IDS
        self.vocab_size = len(SPECIAL_TOKENS) + len(self._characters)
        self.files = {
            "characters.json": (json.dumps(self._characters) + "\n").encode(),
            CONFIG_FILE: config_file(self.kind, self.special),
        }
        self._table = np.full(0x110000, TRAINED_IDS.unk, np.int32)
        codes = np.array([ord(c) for c in self._characters], np.int64)
        self._table[codes] = np.arange(len(SPECIAL_TOKENS), self.vocab_size)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4")
        return self._table[codes], lengths

    def begins(self, texts: Sequence[str]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(len(text)) for text in texts)])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return "".join(map(self.token, self.check_ids(ids)))

    def token(self, id: int) -> str:
        self.check_ids([id])
        return SPECIAL_TOKENS[id] if id < len(SPECIAL_TOKENS) else self._characters[id - len(SPECIAL_TOKENS)]

    def pieces(self) -> tuple[np.ndarray, np.ndarray]:
        special = [UNKNOWN_SPELLING if i == self.special.unk else b"." for i in range(len(SPECIAL_TOKENS))]
        return piece_classes([*special, *(c.encode() for c in self._characters)])


def load_characters(path: Path) -> Characters:
    """A saved `characters.json`, or a directory with one."""
    path = path / "characters.json" if path.is_dir() else path
    try:
        value = json.loads(read_file(path))
    except ValueError as error:
        raise DataError(f"tokenizer file {path} is damaged: {error}") from None
    if not isinstance(value, str) or not value:
        raise DataError(f"tokenizer file {path} must hold a JSON string of characters")
    return Characters(value)


def train_characters(texts: Iterable[str]) -> Characters:
    """The characters that occur."""
    found: set[str] = set()
    for text in texts:
        found.update(text)
    if not found:
        raise DataError("tokenizer: the training text is empty")
    return Characters("".join(found))
