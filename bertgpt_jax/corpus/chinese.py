"""Chinese words by jieba, for masks of whole words: characters that continue a word lose their word-start flag."""

from __future__ import annotations

import functools
import logging
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.corpus.view import WORD_START, ragged_index
from bertgpt_jax.errors import ConfigError

_IDEOGRAPHS = re.compile("[\u2e80-\u2fdf\u3005-\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]{2,}")
"""Runs of two and more; kana and Hangul, which jieba does not know, are not among them."""


@functools.cache
def _segmenter() -> Any:
    """jieba's tokenizer with its own dictionary, once a process.

    Its cache is kept out of the shared temporary directory, where anyone could leave a file that it would load.
    """
    jieba = _jieba()
    jieba.setLogLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as directory:
        segmenter.tmp_dir = directory
        segmenter.initialize()
    return segmenter


def _jieba() -> Any:
    try:
        import jieba
    except ImportError:
        raise ConfigError(
            "corpus.chinese_words = 'jieba' needs the package jieba: pip install 'bertgpt_jax[zh]', "
            "or set it to 'characters'"
        ) from None
    return jieba


def jieba_version() -> str:
    """The version that decides what the words are; ConfigError if jieba is not installed."""
    return str(_jieba().__version__)


def inside_words(text: str) -> np.ndarray:
    """bool[characters + 1]: ideographs that follow another one in the same word of jieba; False behind the end."""
    inside = np.zeros(len(text) + 1, bool)
    for run in _IDEOGRAPHS.finditer(text):
        inside[run.start() + 1 : run.end()] = True
    begin = 0
    for word in _segmenter().cut(text):
        inside[begin] = False
        begin += len(word)
    return inside


def join_words(tokenizer: Tokenizer, texts: Sequence[str], flags: np.ndarray, lengths: np.ndarray) -> None:
    """Takes the word-start flag, in place, from the tokens that begin inside a word of jieba.

    Args:
        flags, lengths: of the tokens of all texts, as `Tokenizer.encode_flagged` gives them.
    """
    chosen = [i for i, text in enumerate(texts) if _IDEOGRAPHS.search(text)]
    if not chosen:
        return
    begins = tokenizer.begins([texts[i] for i in chosen])
    inside = [inside_words(texts[i]) for i in chosen]
    base = np.cumsum([0, *map(len, inside[:-1])])
    joined = np.concatenate(inside)[begins + np.repeat(base, lengths[chosen])]
    tokens = ragged_index((np.cumsum(lengths) - lengths)[chosen], lengths[chosen])
    flags[tokens[joined]] &= ~WORD_START
