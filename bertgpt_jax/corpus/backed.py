"""What tokenizers that run on the `tokenizers` library share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend

from bertgpt_jax.corpus.tokenizer import Tokenizer, read_json
from bertgpt_jax.corpus.word_cache import WordCache
from bertgpt_jax.errors import DataError

_LONG_RUN = re.compile(r"\w{1000,}|[^\w\s]{1000,}|\s{1000,}")


_BLOCK_CHARACTERS = 1 << 20
"""Text cut into words at a time."""
_BOUNDARY = re.compile(r" (?=\S)")
"""Before such a space every text may be cut, whatever the tokenizer."""


class BackedTokenizer(Tokenizer):
    """A tokenizer that is a `tokenizers` pipeline, with a cache of words and one of the parts of words.

    Attributes:
        not_cut: characters that Python takes for white space and the pipeline does not.
    """

    _backend: Backend
    _spellings: list[str]
    not_cut: str

    def words(self, text: str) -> list[str]:
        """Parts of a text without `not_cut` whose ids, one part after another, are the ids of the text."""
        raise NotImplementedError

    def word_parts(self, word: str) -> list[str]:
        """The same of a word, in smaller parts that recur more often."""
        raise NotImplementedError

    def spelled(self, part: str) -> str | None:
        """What the pipeline's model is given for a part that reaches it whole; None for a part that might not."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        whole = "\n".join(texts)
        if any(character in whole for character in self.not_cut):
            return self.encode_whole(texts)
        parts, lengths = [np.zeros(0, np.int32)], np.zeros(len(texts), np.int64)
        for numbers, pieces in _blocks(texts):
            ids, piece_lengths = self.encode_pieces(pieces)
            parts.append(ids)
            np.add.at(lengths, numbers, piece_lengths)
        return np.concatenate(parts), lengths

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """What `encode_batch` gives for texts of bounded size without `not_cut`."""
        return self._word_cache.encode([self.words(piece) for piece in pieces])

    def encode_whole(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """What `encode_batch` gives, every text through the whole pipeline."""
        return _flat([e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)])

    @cached_property
    def _word_cache(self) -> WordCache:
        return WordCache(lambda words: self._part_cache.encode([self.word_parts(word) for word in words]))

    @cached_property
    def _part_cache(self) -> WordCache:
        return WordCache(self.encode_parts)

    def encode_parts(self, parts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Most parts go straight to the model: the pipeline costs four times as much for a word alone."""
        spelled = [self.spelled(part) for part in parts]
        rest = [part for part, spelling in zip(parts, spelled, strict=True) if spelling is None]
        others = iter(self._backend.encode_batch_fast(rest, add_special_tokens=False))
        tokenize = self._backend.model.tokenize
        return _flat([next(others).ids if s is None else [token.id for token in tokenize(s)] for s in spelled])

    def begins(self, texts: Sequence[str]) -> np.ndarray:
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        flat = chain.from_iterable(encoding.offsets for encoding in encodings)
        return np.array([begin for begin, _ in flat], np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._backend.decode(self.check_ids(ids), skip_special_tokens=False)

    def pipeline(self) -> str:
        """The JSON of the `tokenizers` pipeline."""
        return self._backend.to_str()

    def token(self, id: int) -> str:
        return self._spellings[self.check_ids([id])[0]]


def _flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The rows one after another (int32) and their lengths (int64)."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths


def _blocks(texts: Sequence[str]) -> Iterator[tuple[Sequence[int], Sequence[str]]]:
    """The texts in order and in blocks of bounded size, long ones in pieces; each piece with its text's number."""
    if sum(map(len, texts)) <= _BLOCK_CHARACTERS:
        yield range(len(texts)), texts
        return
    numbers: list[int] = []
    pieces: list[str] = []
    size = 0
    for number, text in enumerate(texts):
        lo = 0
        while lo < len(text):
            cut = _BOUNDARY.search(text, lo + _BLOCK_CHARACTERS) if len(text) - lo > _BLOCK_CHARACTERS else None
            hi = cut.start() if cut else len(text)
            numbers.append(number)
            pieces.append(text[lo:hi])
            size += hi - lo
            lo = hi
            if size >= _BLOCK_CHARACTERS:
                yield numbers, pieces
                numbers, pieces, size = [], [], 0
    yield numbers, pieces


def spellings_by_id(vocabulary: dict[str, int], source: str) -> list[str]:
    """Tokens by id; DataError unless the ids are 0..n-1, each once."""
    spellings = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[s] for s in spellings] != list(range(len(spellings))):
        raise DataError(f"{source}: ids are not 0..{len(spellings) - 1}, each once")
    return spellings


def without_long_runs(texts: Iterable[str]) -> Iterator[str]:
    """The texts without runs of 1,000 letters, marks or spaces: merging in a word is quadratic in its length."""
    for text in texts:
        yield _LONG_RUN.sub(" ", text)


def check_trained(found: int, wanted: int) -> None:
    if found < wanted:
        raise DataError(f"tokenizer.vocab_size = {wanted}: this text supports at most {found}; set vocab_size={found}")


def read_pipeline(path: Path, model_type: str) -> tuple[dict, dict]:
    """A `tokenizer.json` and its model section."""
    tree = read_json(path)
    model = tree.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise DataError(f"{path}: no model section with a vocabulary; this is no tokenizer.json")
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    if kind != model_type:
        raise DataError(f"{path}: a {kind} model where {model_type} is wanted; set tokenizer.kind to match")
    return tree, model
