"""The table of tokenizer kinds: config to trained, loaded or saved tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bertgpt_jax.corpus.byte_bpe import load_byte_bpe, train_byte_bpe
from bertgpt_jax.corpus.characters import load_characters, train_characters
from bertgpt_jax.corpus.config import (
    ByteBPEConfig,
    CharactersConfig,
    SentencePieceConfig,
    TokenizerConfig,
    WordPieceConfig,
)
from bertgpt_jax.corpus.places import Place, find_place, local_copy
from bertgpt_jax.corpus.sentence_piece import load_sentencepiece, train_sentencepiece
from bertgpt_jax.corpus.tokenizer import CONFIG_FILE, Tokenizer, read_json
from bertgpt_jax.corpus.wordpiece import load_wordpiece, train_wordpiece
from bertgpt_jax.errors import DataError


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Trains on `texts` (documents or sentences); the same texts in the same order give the same files."""
    match config:
        case WordPieceConfig():
            return train_wordpiece(texts, config)
        case ByteBPEConfig():
            return train_byte_bpe(texts, config)
        case SentencePieceConfig():
            return train_sentencepiece(texts, config)
        case CharactersConfig():
            return train_characters(texts)


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer `config.path` names: one saved by us, or published files."""
    with local_copy(find_place(config.path)) as path:
        return _open(config, path)


def _open(config: TokenizerConfig, path: Path) -> Tokenizer:
    if (path / CONFIG_FILE).is_file() and "format_version" in read_json(path / CONFIG_FILE):
        tokenizer = load_tokenizer(path)
        if tokenizer.kind != config.kind:
            raise DataError(f"tokenizer.path: {path} holds a {tokenizer.kind} one, tokenizer.kind = {config.kind}")
        return tokenizer
    match config:
        case WordPieceConfig():
            return load_wordpiece(path, config.lowercase, config.strip_accents)
        case ByteBPEConfig():
            return load_byte_bpe(path)
        case SentencePieceConfig():
            return load_sentencepiece(path)
        case CharactersConfig():
            return load_characters(path)


def load_tokenizer(directory: str | Place) -> Tokenizer:
    """A tokenizer that `Tokenizer.save` wrote.

    Raises:
        ConfigError, DataError: the directory holds none, or a file is damaged.
    """
    with local_copy(find_place(directory)) as path:
        return _load(path)


def _load(directory: Path) -> Tokenizer:
    settings = read_json(directory / CONFIG_FILE)
    kind = settings.get("kind")
    if kind == "wordpiece":
        return load_wordpiece(directory, bool(settings.get("lowercase")), bool(settings.get("strip_accents")))
    if kind == "byte_bpe":
        return load_byte_bpe(directory)
    if kind == "sentencepiece":
        return load_sentencepiece(directory)
    if kind == "characters":
        return load_characters(directory)
    raise DataError(f"{directory / CONFIG_FILE}: unknown tokenizer kind {kind!r}")
