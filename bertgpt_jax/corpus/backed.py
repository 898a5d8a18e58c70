"""What tokenizers that run on the `tokenizers` library share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend

from bertgpt_jax.corpus.tokenizer import Tokenizer, read_json
from bertgpt_jax.errors import DataError

_LONG_RUN = re.compile(r"\w{1000,}|[^\w\s]{1000,}|\s{1000,}")


class BackedTokenizer(Tokenizer):
    """A tokenizer that is a `tokenizers` pipeline."""

    _backend: Backend
    _spellings: list[str]

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        flat = chain.from_iterable(encoding.ids for encoding in encodings)
        return np.fromiter(flat, np.int32, int(lengths.sum())), lengths

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._backend.decode(self.check_ids(ids), skip_special_tokens=False)

    def pipeline(self) -> str:
        """The JSON of the `tokenizers` pipeline."""
        return self._backend.to_str()

    def token(self, id: int) -> str:
        return self._spellings[self.check_ids([id])[0]]


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
