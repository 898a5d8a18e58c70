"""BERT's tokenization as its Python code does it, one character at a time: the reference for `wordpiece.py`.

The `tokenizers` library gives the same pieces for nearly every text and is what corpora are made with. It departs from
google-research/bert `tokenization.py` (eedf571) where its Unicode tables are older than Python's (marks, punctuation
and unassigned characters), at a final sigma (Python lower-cases it to `ς`), at characters for private use (kept in
Python, removed there) and at the ideographs U+2B820..U+2B91F (words of their own in Python only). What has to be equal
to the original token by token goes through here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

from bertgpt_jax.corpus.tokenizer import read_file
from bertgpt_jax.errors import DataError

MAX_WORD_CHARACTERS = 200
"""Longer words become [UNK] (tokenization.py, WordpieceTokenizer)."""
UNKNOWN = "[UNK]"

_IDEOGRAPHS = (
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F)),
    *((0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
)
"""Blocks whose characters are words of their own (tokenization.py, _is_chinese_char)."""
_WORDS_KEPT = 1 << 20


class ExactWordPiece:
    """`FullTokenizer` of the original.

    Args:
        vocabulary: spelling to id.
        cased: keep case and accents.
    """

    def __init__(self, vocabulary: Mapping[str, int], cased: bool):
        self._vocabulary, self._cased = vocabulary, cased
        self._longest = max(map(len, vocabulary), default=0)
        self._known: dict[str, tuple[str, ...]] = {}

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text."""
        pieces: list[str] = []
        for token in _cleaned(text).split():
            found = self._known.get(token)
            if found is None:
                found = tuple(piece for word in self._words(token) for piece in self._pieces(word))
                if len(self._known) < _WORDS_KEPT:
                    self._known[token] = found
            pieces += found
        return pieces

    def _words(self, token: str) -> list[str]:
        """A run between spaces, lower-cased and stripped of accents unless cased, and cut at punctuation."""
        if not self._cased:
            letters = unicodedata.normalize("NFD", token.lower())
            token = "".join(c for c in letters if unicodedata.category(c) != "Mn")
        return "".join(f" {c} " if _is_punctuation(c) else c for c in token).split()

    def _pieces(self, word: str) -> list[str]:
        """The longest piece of the vocabulary that the word begins with, and so on; [UNK] where there is none."""
        if len(word) > MAX_WORD_CHARACTERS:
            return [UNKNOWN]
        pieces: list[str] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            most = min(len(word), start + self._longest)
            ends = (end for end in range(most, start, -1) if prefix + word[start:end] in self._vocabulary)
            end = next(ends, None)
            if end is None:
                return [UNKNOWN]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces


def _cleaned(text: str) -> str:
    """Control characters and U+FFFD removed, white space made plain, ideographs set apart."""
    kept = []
    for c in text:
        category = unicodedata.category(c)
        if c in "\t\n\r" or category == "Zs":
            kept.append(" ")
        elif c != "\ufffd" and category not in ("Cc", "Cf"):
            kept.append(f" {c} " if any(low <= ord(c) <= high for low, high in _IDEOGRAPHS) else c)
    return "".join(kept)


def _is_punctuation(c: str) -> bool:
    """Unicode's punctuation, and every ASCII mark: `$`, `^` and `+` among them."""
    return (c.isascii() and c.isprintable() and not c.isalnum() and c != " ") or unicodedata.category(c)[0] == "P"


def read_exact_vocabulary(path: Path) -> dict[str, int]:
    """Spelling to id of a `vocab.txt`, as `load_vocab` reads it: in the order of the lines, the last of equals counts.

    Raises:
        DataError: not UTF-8, or one of the tokens that the original writes is missing.
    """
    vocabulary: dict[str, int] = {}
    for number, line in enumerate(text_lines(read_file(path), str(path))):
        vocabulary[line.strip()] = number
    missing = [token for token in ("[CLS]", "[SEP]", "[MASK]", UNKNOWN) if token not in vocabulary]
    if missing:
        raise DataError(f"{path}: no {', '.join(missing)} among its {len(vocabulary)} tokens; give BERT's vocab.txt")
    return vocabulary


def text_lines(data: bytes, source: str) -> Iterator[str]:
    r"""The lines of a file as TensorFlow's `GFile.readline` gives them: parted by \n alone, every \r dropped.

    Raises:
        DataError: naming the line of `source` that is not UTF-8.
    """
    for number, line in enumerate(data.replace(b"\r", b"").removesuffix(b"\n").split(b"\n"), start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise DataError(f"{source}:{number}: byte 0x{byte:02x} is not UTF-8; convert the file") from None
