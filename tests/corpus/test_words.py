"""Ids through the caches of words and parts equal those of the whole pipeline, on any text; the caches stay bounded."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgpt_jax.corpus import backed, word_table
from bertgpt_jax.corpus.config import ByteBPEConfig, WordPieceConfig
from bertgpt_jax.corpus.kinds import open_tokenizer, train_tokenizer
from bertgpt_jax.corpus.word_cache import WordCache
from bertgpt_jax.corpus.word_table import LONGEST, WordTable

SPACES = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace())
NEAR_SPACES = "\u200b\u200d\u2060\ufeff\u180e\x00\x01\x07\x1b\x7f\x80\xad\ufffd"
MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~¡«»—…“”¶§€£"
LETTERS = "aAbZßİıσΣςéÉe\u0301a\u0308\u0315\u0327ÅÅñǄﬁｶﾞかが\u3099नमस्ते한각\u1112\u1161עَعあ漢字㐀㏀丽豈𠀀𪚥🚀👩\u200d👧"
DIGITS = "0129٣५Ⅷ²½"
FRAGMENTS = [
    *SPACES,
    *NEAR_SPACES,
    *MARKS,
    *LETTERS,
    *DIGITS,
    " ",
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n ",
    "the",
    " the",
    "The",
    *("q" * n for n in range(14, 19)),
    "é" * 8,
]
FRAGMENTS += ["don't", "we'll", "'s", " 're", "I'M", "[SEP]", "<|endoftext|>", "wonderful", "x" * 201, "1234", "naïve"]
TEXTS = [
    "The wonderful people don't naïvely wonder; we'll see 12345 of them, they're the newest; he'd say I'm. " * 30,
    "".join(FRAGMENTS) * 2,
    "नमस्ते दुनिया 漢字かな交じり文 Σίσυφος ΟΔΟΣ " * 30,
]


def variants() -> dict:
    found = {"byte_bpe": train_tokenizer(TEXTS, ByteBPEConfig(vocab_size=400))}
    for name, lowercase, strip in (("uncased", True, True), ("cased", False, False), ("accents", True, False)):
        config = WordPieceConfig(vocab_size=300, lowercase=lowercase, strip_accents=strip)
        found[name] = train_tokenizer(TEXTS, config)
    return found


@pytest.fixture(scope="module")
def tokenizers():
    return variants()


KINDS = ("byte_bpe", "uncased", "cased", "accents")


def assert_equal(tokenizer, texts) -> None:
    """Compares one by one after comparing all at once, for a message that names the text."""
    ids, lengths = tokenizer.encode_batch(texts)
    whole_ids, whole_lengths = tokenizer.encode_whole(texts)
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
    if lengths.tolist() != whole_lengths.tolist() or ids.tolist() != whole_ids.tolist():
        wrong = [t for t in texts if tokenizer.encode(t).tolist() != tokenizer.encode_whole([t])[0].tolist()]
        pytest.fail(f"ids differ in the texts {wrong[:3]!r}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_white_space(tokenizers, kind):
    patterns = ("a{0}b", "!{0}!", " a{0} b", "a {0}b", "a{0}{0}b", "{0}a", "a{0}", "a{0}'s", "é{0}\u0301e", "漢{0}字")
    texts = [pattern.format(c) for c in SPACES + NEAR_SPACES for pattern in patterns]
    texts += [f"a{x}{y}b{x} {y}c" for x in SPACES for y in SPACES]
    for text in texts:  # each alone: one character that is not cut sends its whole batch another way
        assert tokenizers[kind].encode(text).tolist() == tokenizers[kind].encode_whole([text])[0].tolist(), repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_nasty_texts(tokenizers, kind):
    rng = random.Random(7)
    tokenizer = tokenizers[kind]
    usable = [f for f in FRAGMENTS if not set(f) & set(tokenizer.not_cut)]
    texts = ["".join(rng.choices(usable, k=rng.randint(0, 25))) for _ in range(3000)]
    assert_equal(tokenizer, texts)
    assert_equal(tokenizer, [text + tokenizer.not_cut for text in texts[:50]])
    assert_equal(tokenizer, TEXTS)
    assert_equal(tokenizer, [])
    assert_equal(tokenizer, ["", " ", "", "\n"])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(texts=st.lists(st.text(max_size=30), max_size=4))
def test_any_text(tokenizers, kind, texts):
    assert_equal(tokenizers[kind], texts)


@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-base-cased", "bert-base-chinese", "gpt2"])
def test_real_text_with_published_vocabularies(shared_data, name):
    cased = name == "bert-base-cased"
    path = str(shared_data / "vocab" / name)
    bert = WordPieceConfig(path=path, lowercase=not cased, strip_accents=not cased)
    tokenizer = open_tokenizer(ByteBPEConfig(path=path) if name == "gpt2" else bert)
    texts = [p.read_text("utf-8") for p in sorted((shared_data / "lm" / "bert-sample-text").glob("*.txt"))]
    inputs = sorted((shared_data / "vocab" / "llama.cpp-golden").glob("*.inp"))
    texts += [text for p in inputs for text in p.read_bytes().decode().split("\n__ggml_vocab_test__\n")]
    assert len(texts) > 40
    texts.append("I'd he'd 'd we've don't they're I'm she'll I'D it's 's'S  's")
    for text in texts:
        assert_equal(tokenizer, [text])
    assert_equal(tokenizer, [line for text in texts for line in text.split("\n")])


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_cut_into_pieces(tokenizers, kind, monkeypatch):
    monkeypatch.setattr(backed, "_BLOCK_CHARACTERS", 50)
    seen: list[int] = []
    encode = tokenizers[kind].encode_pieces
    monkeypatch.setattr(tokenizers[kind], "encode_pieces", lambda p: seen.extend(map(len, p)) or encode(p))
    text = "some words  and\nmore \n of them, don't cut 'em. " * 20
    assert_equal(tokenizers[kind], ["x", text, "", text[5:], "y" * 300, "\n" * 120 + "z"])
    assert sorted(seen)[-2:] == [121, 300] and sorted(seen)[-3] < 70


def test_a_cache_stays_bounded_and_right():
    calls: list[int] = []

    def encode(words):
        calls.append(len(words))
        assert len(set(words)) == len(words)
        lengths = np.array([len(w) for w in words], np.int64)
        return np.array([ord(c) for w in words for c in w], np.int32), lengths

    rng = random.Random(1)
    words = ["".join(rng.choices("abc", k=rng.randint(0, 5))) for _ in range(5000)]
    for limits in ((50, 10_000), (10_000, 200)):
        cache = WordCache(encode, *limits)
        for i in range(0, 5000, 25):
            texts = [words[i : i + 10], [], words[i + 10 : i + 25]]
            ids, lengths = cache.encode(texts)
            assert "".join(map(chr, ids)) == "".join("".join(text) for text in texts)
            assert lengths.tolist() == [sum(map(len, text)) for text in texts]
            assert len(cache) <= 50 + 25 if limits[0] == 50 else len(cache) < 200
    assert sum(calls) < 6000  # a word is encoded again only after the cache was full


def test_threads_share_a_cache(tokenizers):
    tokenizer = train_tokenizer(TEXTS, WordPieceConfig(vocab_size=300))
    lines = [f"{a} {b}{c}" for a in ("the", "naïve", "12") for b in "abcxyz" for c in range(40)]
    expected = [tokenizer.encode_whole([line])[0].tolist() for line in lines]
    with ThreadPoolExecutor(8) as pool:
        assert [ids.tolist() for ids in pool.map(tokenizer.encode, lines * 3)] == expected * 3


def test_a_table_of_short_words_is_exact_and_bounded(monkeypatch):
    """Words that differ in one byte, that begin others, that fill the 16 bytes; more words than the table holds."""
    monkeypatch.setattr(word_table, "_CAPACITY", 64)
    monkeypatch.setattr(word_table, "_SLOTS", 128)
    monkeypatch.setattr(word_table, "_AT_ONCE", 50)
    seen: list[str] = []

    def encode(words):
        assert len(set(words)) == len(words) <= 50
        seen.extend(words)
        return np.array([ord(c) for w in words for c in w], np.int32), np.array([len(w) for w in words], np.int64)

    table = WordTable(encode)
    rng = random.Random(3)
    few = ["a" * n for n in range(1, LONGEST + 1)] + ["a" * n + "b" for n in range(LONGEST)] + ["b" * 8 + "a", "\x01"]
    many = ["".join(rng.choices("abcXYZ09", k=rng.randint(1, LONGEST))) for _ in range(3000)]
    rounds: list[int] = []
    for words in (few, rng.choices(few, k=1000), many, [], few):
        data = " ".join(words).encode()
        lengths = np.array([len(w) for w in words], np.int64)
        ids, counts = table.encode(data, np.cumsum(lengths + 1) - lengths - 1, lengths)
        assert "".join(map(chr, ids)) == "".join(words) and counts.tolist() == lengths.tolist()
        assert len(table) <= 64
        rounds.append(len(seen))
    assert rounds[0] == rounds[1] == len(few)  # a word is encoded again only after the table was full
    assert rounds[2] == rounds[3] < rounds[4] and set(seen) == {*few, *many}
