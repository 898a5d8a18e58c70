"""GPT-2's byte-level BPE, through the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from bertgpt_jax.corpus.backed import BackedTokenizer, check_trained, read_pipeline, spellings_by_id, without_long_runs
from bertgpt_jax.corpus.config import ByteBPEConfig
from bertgpt_jax.corpus.special import SPECIAL_TOKENS, TRAINED_IDS, SpecialIds
from bertgpt_jax.corpus.tokenizer import CONFIG_FILE, config_file, find_special, piece_classes, read_file, read_json
from bertgpt_jax.errors import DataError

_WORDS = re.compile(r" ?\S+|\s+(?!\S)|\s")
_PARTS = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+")
"""GPT-2's pattern for a word in ASCII."""


class ByteBPE(BackedTokenizer):
    """GPT-2's tokenizer over a vocabulary and its merges, in order."""

    kind = "byte_bpe"
    not_cut = "\x1c\x1d\x1e\x1f"  # marks like any other in GPT-2's pattern

    def __init__(self, vocabulary: Sequence[str], merges: Sequence[tuple[str, str]], special: SpecialIds):
        self.vocab_size, self.special = len(vocabulary), special
        self._spellings = list(vocabulary)
        ids = {token: i for i, token in enumerate(vocabulary)}
        self.files = {
            "vocab.json": (json.dumps(ids, ensure_ascii=False) + "\n").encode(),
            "merges.txt": "#version: 0.2\n{}".format("".join(f"{a} {b}\n" for a, b in merges)).encode(),
            CONFIG_FILE: config_file(self.kind, special),
        }
        self._backend = Backend(models.BPE(ids, list(merges)))
        self._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        self._backend.decoder = decoders.ByteLevel()

    def words(self, text: str) -> list[str]:
        """Parts that each begin where GPT-2's pattern begins a match.

        A space goes with the marks, letters or digits after it. Of longer white space before them the last character
        stands apart; at the end of the text all of it is one match (openai/gpt-2 encoder.py, the last alternatives).
        """
        return _WORDS.findall(text)

    def word_parts(self, word: str) -> list[str]:
        return _PARTS.findall(word) if word.isascii() else [word]

    def spelled(self, part: str) -> str | None:
        """Printable ASCII stands for its own bytes, except the space."""
        return part.replace(" ", "Ġ") if part.isascii() and part.isprintable() and not part.isspace() else None

    def pieces(self) -> tuple[np.ndarray, np.ndarray]:
        table = {character: byte for byte, character in enumerate(_byte_characters())}
        special = {self._spellings[i] for i in self.special.ids()}
        return piece_classes(
            [b"." if s in special else bytes(table[c] for c in s if c in table) for s in self._spellings]
        )


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte (openai/gpt-2 encoder.py, bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(hidden)) for byte in range(256)]


def load_byte_bpe(path: Path) -> ByteBPE:
    """`encoder.json` + `vocab.bpe`, `vocab.json` + `merges.txt` or `tokenizer.json`: one of them or their directory."""
    directory = path if path.is_dir() else path.parent
    pairs = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
    pair = next((p for p in pairs if (directory / p[0]).exists() and path.name != "tokenizer.json"), None)
    if pair is None:
        source = path / "tokenizer.json" if path.is_dir() else path
        tree, model = read_pipeline(source, "BPE")
        if "ByteLevel" not in json.dumps(tree.get("pre_tokenizer")):
            raise DataError(f"{source}: this BPE is not byte-level; only GPT-2's kind is read")
        vocabulary = dict(model["vocab"]) | {row["content"]: row["id"] for row in tree.get("added_tokens", ())}
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    else:
        source, vocabulary = directory / pair[0], read_json(directory / pair[0])
        lines = read_file(directory / pair[1]).decode("utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    spellings = spellings_by_id(vocabulary, str(source))
    missing = [character for character in _byte_characters() if character not in vocabulary]
    if missing:
        raise DataError(f"{source}: no token for {len(missing)} of the 256 bytes; this is no byte-level BPE")
    for number, merge in enumerate(merges):
        if len(merge) != 2 or "".join(merge) not in vocabulary:
            raise DataError(f"{source}: merge {number} {' '.join(merge)!r} makes no token of the vocabulary")
    special = find_special(vocabulary.get)
    if special.eot is None:
        raise DataError(f"{source}: no <|endoftext|>, [EOT] or </s> to end documents with")
    return ByteBPE(spellings, merges, special)


def train_byte_bpe(texts: Iterable[str], config: ByteBPEConfig) -> ByteBPE:
    """Trains merges: our special tokens are ids 0..5, the 256 bytes follow, then the merges by rank."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(_byte_characters()),
        max_token_length=64,
        show_progress=False,
    )
    backend.train_from_iterator(without_long_runs(texts), trainer)
    model = json.loads(backend.to_str())["model"]
    check_trained(len(model["vocab"]), config.vocab_size)
    return ByteBPE(spellings_by_id(model["vocab"], "trained"), [tuple(m) for m in model["merges"]], TRAINED_IDS)
