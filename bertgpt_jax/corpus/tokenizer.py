"""What a tokenizer is, whatever its kind; how one is trained, saved and loaded.

A saved tokenizer is a directory: `tokenizer_config.json` (kind, settings, special ids) and the files of its kind. Its
sha256 is over those files as we write them, so a published vocabulary has one hash wherever it was loaded from.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bertgpt_jax.corpus.places import Place, find_place
from bertgpt_jax.corpus.special import SpecialIds
from bertgpt_jax.corpus.view import SENTENCE_START, WORD_START
from bertgpt_jax.errors import ConfigError, DataError, StorageError

CONFIG_FILE = "tokenizer_config.json"
MAX_FILE_BYTES = 256 << 20
"""Larger tokenizer files are refused unread."""

UNKNOWN_SPELLING = b"x"
"""An unknown character counts as a letter when words are looked for."""

_SPACE, _LETTER, _DIGIT, _OTHER, _INSIDE, _CJK, _ONE_SPACE = range(7)


class Tokenizer:
    """Text to ids and back.

    Subclasses set the attributes and define `encode_batch`, `decode` and `token`.

    Attributes:
        kind: as in the config.
        vocab_size: ids are 0..vocab_size-1.
        special: ids of the special tokens. Text never produces them (except `unk`): `[SEP]` in a text is four pieces.
        files: name to content of what `save` writes.
    """

    kind: str
    vocab_size: int
    special: SpecialIds
    files: dict[str, bytes]

    @property
    def sha256(self) -> str:
        """Hex digest over the canonical files."""
        digest = hashlib.sha256()
        for name in sorted(self.files):
            digest.update(f"{name}:{len(self.files[name])}:".encode() + self.files[name])
        return digest.hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after another (int32) and the number of ids of each (int64)."""
        raise NotImplementedError

    def begins(self, texts: Sequence[str]) -> np.ndarray:
        """The character of its text at which each id of `encode_batch(texts)` begins, int64; slower than that."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; special tokens appear by name. DataError for an id outside the vocabulary."""
        raise NotImplementedError

    def token(self, id: int) -> str:
        """The vocabulary's spelling of one id."""
        raise NotImplementedError

    def pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """Per id the class of its first and of its last character, uint8[vocab_size] each (see `word_starts`)."""
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, int32; no special tokens are added."""
        return self.encode_batch([text])[0]

    def encode_flagged(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids (int32) and flags (uint8: word start, sentence start) of all sentences, and each one's length."""
        ids, lengths = self.encode_batch(sentences)
        begins = (np.cumsum(lengths) - lengths)[lengths > 0]
        flags = self.word_starts(ids, begins).astype(np.uint8) * WORD_START
        flags[begins] |= SENTENCE_START
        return ids, flags, lengths

    def encode_sentences(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int32) and flags (uint8) of the sentences of a document."""
        return self.encode_flagged(sentences)[:2]

    def word_starts(self, ids: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """bool per id: whether a word starts there; `begins` are the positions at which texts start.

        A word is a run of letters or a run of digits, a Chinese or Japanese character or any other character, with the
        one space before it. Pieces that begin inside a character continue it.
        """
        if not hasattr(self, "_pieces"):
            self._pieces = self.pieces()
        first, last = self._pieces[0].take(ids), self._pieces[1].take(ids)
        open_ = np.flatnonzero(last == _INSIDE)
        open_ = open_[open_ != np.arange(len(open_))]  # nothing comes before those at the start
        while len(open_):  # as often as a character has bytes
            last[open_] = found = last.take(open_ - 1)
            open_ = open_[found == _INSIDE]
        before = np.empty_like(last)
        before[1:] = last[:-1]
        before[:1] = _SPACE
        inside = (first == before) & ((first == _LETTER) | (first == _DIGIT))
        inside |= (first == _INSIDE) | ((before == _ONE_SPACE) & (first != _SPACE))
        starts = ~inside
        starts[begins] = True
        return starts

    def lost_characters(self, text: str) -> Counter[str]:
        """Characters of `text`, white space aside, that normalisation removes before pieces are looked for."""
        return Counter()

    def special_mask(self) -> np.ndarray:
        """bool[vocab_size]: ids that are never masked and never drawn as a random replacement."""
        mask = np.zeros(self.vocab_size, bool)
        mask[list(self.special.ids())] = True
        return mask

    def check_ids(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """`ids` as a list; DataError names the first that is not in the vocabulary."""
        plain = [int(i) for i in ids]
        for position, i in enumerate(plain):
            if not 0 <= i < self.vocab_size:
                raise DataError(f"id {i} at position {position} is outside the vocabulary 0..{self.vocab_size - 1}")
        return plain

    def save(self, directory: str | Place) -> None:
        """Writes the canonical files, the config last."""
        directory = find_place(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name in sorted(self.files, key=lambda n: n == CONFIG_FILE):
            (directory / name).write_bytes(self.files[name])


@functools.lru_cache(maxsize=1 << 16)
def character_class(character: str) -> int:
    """The class `word_starts` works with."""
    if character.isspace() or character == "▁":
        return _SPACE
    category = unicodedata.category(character)
    if category[0] in "LM":
        code = ord(character)
        ideograph = 0x2E80 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x3FFFF
        return _CJK if ideograph else _LETTER
    return _DIGIT if category[0] == "N" else _OTHER


def piece_classes(spellings: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """First and last classes of pieces given as UTF-8, which may begin or end inside a character.

    Of a character's first bytes the class is guessed; pieces of its other bytes have the class `_INSIDE`.
    """
    first = np.empty(len(spellings), np.uint8)
    last = np.empty(len(spellings), np.uint8)
    for number, spelling in enumerate(spellings):
        text = spelling.decode("utf-8", "replace")
        begins_inside = bool(spelling) and 0x80 <= spelling[0] < 0xC0
        if begins_inside or not text:
            first[number] = _INSIDE
        elif text[0] == "\ufffd":
            first[number] = _class_of_lead(spelling)
        else:
            first[number] = character_class(text[0])
        if text in (" ", "▁"):
            last[number] = _ONE_SPACE
            continue
        if not text or text[-1] == "\ufffd":
            lead = max((i for i, byte in enumerate(spelling) if byte >= 0xC0), default=None)
            last[number] = _INSIDE if lead is None else _class_of_lead(spelling[lead:])
        else:
            last[number] = character_class(text[-1])
    return first, last


def _class_of_lead(first_bytes: bytes) -> int:
    """The class of most characters that begin with these bytes: E3 to E9 and F0 A0 lead ideographs, C2 and E2 signs,
    F0 9F emoji."""
    lead, second = first_bytes[0], first_bytes[1] if len(first_bytes) > 1 else 0x9F
    if 0xE3 <= lead <= 0xE9 or (lead == 0xF0 and second >= 0xA0):
        return _CJK
    return _OTHER if lead in (0xC2, 0xE2) or (lead == 0xF0 and second == 0x9F) else _LETTER


# ---------------------------------------------------------------- files


def read_file(path: Path) -> bytes:
    """The bytes of a tokenizer file; StorageError or DataError name the path and what is wrong with it."""
    if path.is_dir():
        raise DataError(f"tokenizer.path: {path} is a directory; name a file in it")
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"tokenizer file {path} has {size:,} bytes; the limit is {MAX_FILE_BYTES:,}")
        data = path.read_bytes()
    except FileNotFoundError:
        advice = "pass a published vocabulary, or '' to train one"
        raise ConfigError(f"tokenizer.path: {path} not found; {advice}") from None
    except OSError as error:
        raise StorageError(f"tokenizer file {path}: cannot be read ({error.strerror})") from None
    if not data:
        raise DataError(f"tokenizer file {path} is empty (0 bytes); fetch it again")
    return data


def read_json(path: Path) -> dict:
    """A JSON object from a tokenizer file."""
    data = read_file(path)
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise DataError(f"tokenizer file {path} is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise DataError(f"tokenizer file {path} holds {type(tree).__name__}, not an object")
    return tree


def config_file(kind: str, special: SpecialIds, **settings: object) -> bytes:
    """The content of `tokenizer_config.json`."""
    tree = {"format_version": 1, "kind": kind, **settings, "special_ids": dataclasses.asdict(special)}
    return (json.dumps(tree, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def find_special(ids: Callable[[str], int | None]) -> SpecialIds:
    """Special ids of a published vocabulary by the names that BERT, RoBERTa, XLNet, T5 and GPT-2 use."""

    def first(*names: str) -> int | None:
        return next((i for i in map(ids, names) if i is not None), None)

    sep = first("[SEP]", "<sep>", "</s>")
    eot = first("[EOT]", "<|endoftext|>", "<eod>", "</s>")
    return SpecialIds(
        pad=first("[PAD]", "<pad>"),
        unk=first("[UNK]", "<unk>"),
        cls=first("[CLS]", "<cls>", "<s>"),
        sep=sep,
        mask=first("[MASK]", "<mask>"),
        eot=sep if eot is None else eot,
    )
