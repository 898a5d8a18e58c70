"""Whole-word masks on nasty text: what a word is for each kind of tokenizer, and that masks keep to it."""

from __future__ import annotations

import numpy as np
import pytest

from bertgpt_jax.batches.masking import Masking, mask_rows, mask_tables
from bertgpt_jax.corpus.byte_bpe import load_byte_bpe, train_byte_bpe
from bertgpt_jax.corpus.characters import train_characters
from bertgpt_jax.corpus.config import ByteBPEConfig, SentencePieceConfig, WordPieceConfig
from bertgpt_jax.corpus.sentence_piece import train_sentencepiece
from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.corpus.view import WORD_START
from bertgpt_jax.corpus.wordpiece import train_wordpiece

KINDS = ("wordpiece", "byte_bpe", "sentencepiece", "characters")
FAMILY = "👩\u200d👩\u200d👧"

TABLE: list[tuple[str, list[str], dict[str, list[str]]]] = [
    ("don't stop", ["don", "'", "t", "stop"], {"byte_bpe": ["don", "'t", "stop"]}),
    ("  two  spaces ", ["two", "spaces"], {}),
    ("a\nb\n\nc\r\n", ["a", "b", "c"], {}),
    ("\tTab\u00a0stop", ["Tab", "stop"], {}),
    ("naïve cafe\u0301", ["naïve", "cafe\u0301"], {}),
    ("北京is大学", ["北", "京", "is", "大", "学"], {}),
    ("力加勝北区 is", ["力", "加", "勝", "北", "区", "is"], {}),
    # kana are signs of their own where a tokenizer sees characters, and letters to BERT
    ("ひらが カナ", ["ひ", "ら", "が", "カ", "ナ"], {"wordpiece": ["ひらが", "カナ"]}),
    ("한국어 문장", ["한국어", "문장"], {}),
    (f"{FAMILY} ok🙂🙂", ["👩", "👩", "👧", "ok", "🙂", "🙂"], {"wordpiece": [FAMILY, "ok🙂🙂"]}),
    ("مرحبا بالعالم", ["مرحبا", "بالعالم"], {}),
    ("שלום, עולם", ["שלום", ",", "עולם"], {}),
    ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"], {}),
    ("x" * 60 + " y", ["x" * 60, "y"], {}),
    ("1,234.5kg", ["1", ",", "234", ".", "5", "kg"], {"wordpiece": ["1", ",", "234", ".", "5kg"]}),
    ("state-of-the-art", ["state", "-", "of", "-", "the", "-", "art"], {}),
    ("[SEP] ##ing", ["[", "SEP", "]", "#", "#", "ing"], {"byte_bpe": ["[", "SEP", "]", "##", "ing"]}),
    ("a\u200bb", ["a", "b"], {"wordpiece": ["a\u200bb"]}),
    ("e.g. U.S.A.", ["e", ".", "g", ".", "U", ".", "S", ".", "A", "."], {}),
    ("…", ["…"], {}),
    ("", [], {}),
]
"""Text, its words without the white space around them, and the kinds for which they differ."""


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    texts = [text for text, _, _ in TABLE]
    plain = [text for text in texts if text.isascii()]
    pieces = SentencePieceConfig(vocab_size=100, character_coverage=1)
    return {
        "wordpiece": train_wordpiece(texts * 3, WordPieceConfig(vocab_size=190, character_coverage=1)),
        "byte_bpe": train_byte_bpe(plain * 3, ByteBPEConfig(vocab_size=280)),
        "sentencepiece": train_sentencepiece(texts * 3, pieces),
        "characters": train_characters(texts),
    }


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """The parts of a text between the tokens that begin a word, what is nothing but space or joiners left out."""
    flags, begins = tokenizer.encode_sentences([text])[1], tokenizer.begins([text])
    edges = [*begins[(flags & WORD_START) > 0].tolist(), len(text)]
    parts = [text[a:b].strip().strip("\u200b\u200d") for a, b in zip(edges, edges[1:], strict=False)]
    return [part for part in parts if part]


@pytest.mark.parametrize("text, words, others", TABLE, ids=[text[:12] for text, _, _ in TABLE])
@pytest.mark.parametrize("kind", KINDS)
def test_words_of(tokenizers, kind, text, words, others):
    assert words_of(tokenizers[kind], text) == others.get(kind, words)


@pytest.mark.parametrize("spans", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_keep_to_words(tokenizers, kind, spans):
    """A word of the row is hidden as a whole or not at all, unless the row's end cuts it."""
    tokenizer, length = tokenizers[kind], 300
    special = tokenizer.special
    ids, flags = tokenizer.encode_sentences([f"{text} " for text, _, _ in TABLE])
    ids, starts = ids[: length - 2], (flags[: length - 2] & WORD_START) > 0
    row, word_start = np.full(length, special.pad, np.int32), np.zeros(length, bool)
    row[0], row[1 : len(ids) + 1], row[len(ids) + 1] = special.cls, ids, special.sep
    word_start[1 : len(ids) + 1] = starts
    tokens, repeat = np.tile(row, (200, 1)), (200, 1)
    masking = Masking(rate=0.3, whole_word=True, spans=spans, mask_fraction=1, random_fraction=0)
    tables = mask_tables(masking, special.mask, tokenizer.special_mask(), special.unk)
    out = mask_rows(masking, tables, 0, 0, np.arange(200), tokens, tokens != special.pad, np.tile(word_start, repeat))
    hidden = out["tokens"][:, 1 : len(ids) + 1] == special.mask
    maskable = ~tokenizer.special_mask()[ids]
    # an unknown token is never hidden, and parts what stands beside it
    word = np.cumsum(starts | ~maskable | np.append(True, ~maskable[:-1]))
    for number in np.unique(word[maskable]):
        together = hidden[:, (word == number) & maskable].sum(1)
        assert set(together.tolist()) <= {0, int(((word == number) & maskable).sum())}
    assert not hidden[:, ~maskable].any() and hidden.any(0)[maskable].mean() > 0.9
    wanted = round(0.3 * (len(ids) + 2))
    assert (hidden.sum(1) <= wanted).all() and hidden.sum(1).mean() > 0.9 * wanted


def test_words_of_the_published_gpt2(shared_data):
    """A vocabulary whose pieces cut most characters of other scripts into bytes."""
    gpt2 = load_byte_bpe(shared_data / "vocab" / "gpt2")
    expected = {
        "The naïve café": ["The", "naïve", "café"],
        "नमस्ते दुनिया": ["नमस्ते", "दुनिया"],
        "สวัสดี": ["สวัสดี"],
        "北京的大学": ["北", "京", "的", "大", "学"],
        "Привет, мир": ["Привет", ",", "мир"],
        "αβγ δ🙂ε": ["αβγ", "δ", "🙂", "ε"],
    }
    assert {text: words_of(gpt2, text) for text in expected} == expected
