"""Chinese words: which tokens begin one, by character and by jieba, for every kind of tokenizer."""

from __future__ import annotations

import re
import sys
import types

import numpy as np
import pytest

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.windows import FullDocuments
from bertgpt_jax.config import build, identity
from bertgpt_jax.corpus import chinese
from bertgpt_jax.corpus.builder import prepare_corpus
from bertgpt_jax.corpus.byte_bpe import train_byte_bpe
from bertgpt_jax.corpus.characters import train_characters
from bertgpt_jax.corpus.config import ByteBPEConfig, CorpusConfig, SentencePieceConfig
from bertgpt_jax.corpus.plan import find_request
from bertgpt_jax.corpus.reader import CorpusReader
from bertgpt_jax.corpus.sentence_piece import train_sentencepiece
from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.corpus.view import SENTENCE_START, WORD_START
from bertgpt_jax.corpus.wordpiece import load_wordpiece
from bertgpt_jax.errors import ConfigError

WORDS = ["我", "来到", "北京", "清华大学", "很", "好", "清华", "大学", "学生", "是"]
TEXTS = [
    "我来到北京清华大学。",
    "我是大学学生, 2 OK",
    "北京 很好",
    "no Chinese don't",
    " 好 ",
    "e\u0301𠮷北京👩\u200d👧x",
    "",
    "来",
]
SPLIT = [
    "我|来到|北京|清华大学|。",
    "我|是|大学|学生|,| |2| |OK",
    "北京| |很|好",
    "no| |Chinese| |don't",
    " |好| ",
    "e\u0301|𠮷|北京|👩\u200d👧x",
    "",
    "来",
]


@pytest.fixture
def jieba(monkeypatch):
    """A stand-in with the same interface: the longest word of a list, else one character."""

    class Segmenter:
        def initialize(self):
            assert self.tmp_dir

        def cut(self, text):
            while text:
                word = next((w for w in sorted(WORDS, key=len, reverse=True) if text.startswith(w)), text[0])
                yield word
                text = text[len(word) :]

    module = types.ModuleType("jieba")
    module.__version__, module.Tokenizer, module.setLogLevel = "0.0", Segmenter, lambda level: None
    monkeypatch.setitem(sys.modules, "jieba", module)
    chinese._segmenter.cache_clear()
    yield module
    chinese._segmenter.cache_clear()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    letters = sorted({c for text in TEXTS for c in text if not c.isspace()} - {"学"})  # 学 is unknown
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]))
    sample = [" ".join(TEXTS), "北京大学清华大学" * 30, "我来到" * 30]
    return {
        "wordpiece": load_wordpiece(path, lowercase=True, strip_accents=True),
        "byte_bpe": train_byte_bpe(sample, ByteBPEConfig(vocab_size=290)),
        "sentencepiece": train_sentencepiece(sample, SentencePieceConfig(vocab_size=48, character_coverage=1)),
        "characters": train_characters(sample),
    }


KINDS = ("wordpiece", "byte_bpe", "sentencepiece", "characters")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_begin_where_they_stand(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids, lengths = tokenizer.encode_batch(TEXTS)
    begins = tokenizer.begins(TEXTS)
    assert begins.dtype == np.int64 and len(begins) == len(ids)
    ends = np.cumsum(lengths)
    for text, lo, hi in zip(TEXTS, ends - lengths, ends, strict=True):
        assert (np.diff(begins[lo:hi]) >= 0).all() and (begins[lo:hi] <= len(text)).all()
        for i, begin in zip(ids[lo:hi], begins[lo:hi], strict=True):
            spelling = tokenizer.decode([i]).removeprefix("##").strip()
            if len(spelling) == 1 and spelling in text and "\ufffd" not in spelling:
                assert spelling in text[begin : begin + 2].lower() + text[begin : begin + 2], (text, spelling, begin)


def flags_of(tokenizer: Tokenizer, joined: bool) -> tuple[list[list[int]], list[list[int]]]:
    """For each text where its words begin, and where its tokens do."""
    _, flags, lengths = tokenizer.encode_flagged(TEXTS)
    sentence_starts = flags & SENTENCE_START
    if joined:
        chinese.join_words(tokenizer, TEXTS, flags, lengths)
    np.testing.assert_array_equal(flags & SENTENCE_START, sentence_starts)
    begins, ends = tokenizer.begins(TEXTS), np.cumsum(lengths)
    starts = (flags & WORD_START) > 0
    cut = [(slice(hi - n, hi)) for hi, n in zip(ends, lengths, strict=True)]
    return [begins[c][starts[c]].tolist() for c in cut], [begins[c].tolist() for c in cut]


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_jieba_are_joined(tokenizers, jieba, kind):
    apart, tokens = flags_of(tokenizers[kind], joined=False)
    joined, _ = flags_of(tokenizers[kind], joined=True)
    for text, split, before, after, begins in zip(TEXTS, SPLIT, apart, joined, tokens, strict=True):
        words = split.split("|")
        assert "".join(words) == text
        inside = {i for i in range(len(text)) if chinese.inside_words(text)[i]}
        begin = 0
        for word in words:
            ideographs = [begin + k for k in range(1, len(word)) if all("\u3400" <= c <= "\u9fff" for c in word)]
            assert set(ideographs) == inside & set(range(begin, begin + len(word)))
            begin += len(word)
        assert after == [b for b in before if b not in inside]
        if kind in ("wordpiece", "characters"):  # one token a character
            assert set(inside) <= set(begins) and (len(after) < len(before)) == bool(inside)


def test_a_corpus_masks_whole_words_of_jieba(jieba, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(["我来到北京清华大学。我是大学学生。"] * 60))
    tree = {"path": str(tmp_path / "a.txt"), "tokenizer": {"kind": "characters"}, "workers": 0}
    tree["held_out"] = {"kind": "hash", "fraction": 0}
    readers = {}
    for words in ("characters", "jieba"):
        config = build(CorpusConfig, tree | {"chinese_words": words}, "test")
        readers[words] = CorpusReader(prepare_corpus(config, tmp_path / words, progress=False))
    flags = {words: reader.gather_flags(np.array([0]), np.array([17])) for words, reader in readers.items()}
    starts = {words: ((value & WORD_START) > 0).tolist() for words, value in flags.items()}
    assert starts["characters"] == [True] * 17
    assert [i for i, s in enumerate(starts["jieba"]) if not s] == [2, 4, 6, 7, 8, 13, 15]
    masking = Masking(rate=0.4, whole_word=True, mask_fraction=1, random_fraction=0)
    data = Dataset(readers["jieba"], FullDocuments(), masking, sequence_length=36, batch_size=8)
    together = apart = 0
    for n in range(4):
        batch = data.batch(n)
        hidden = batch["tokens"] == readers["jieba"].special.mask
        row, slot = np.nonzero(batch["mask_weights"])
        batch["tokens"][row, batch["mask_positions"][row, slot]] = batch["mask_labels"][row, slot]
        for ids, masked in zip(batch["tokens"], hidden, strict=True):
            line = "".join(readers["jieba"].tokenizer.token(i) if i > 5 else "|" for i in ids)
            for at in (match.start() for match in re.finditer("清华大学", line)):
                together += masked[at : at + 4].all()
                apart += 0 < masked[at : at + 4].sum() < 4
    assert together > 10 and not apart


def test_the_version_is_part_of_the_request(jieba, tmp_path):
    (tmp_path / "a.txt").write_text("我来到北京")
    plain = build(CorpusConfig, {"path": str(tmp_path / "a.txt")}, "test")
    by_jieba = build(CorpusConfig, {"path": str(tmp_path / "a.txt"), "chinese_words": "jieba"}, "test")
    assert "chinese_words" not in identity(plain)
    first = find_request(by_jieba)[1]
    assert first == find_request(by_jieba)[1] != find_request(plain)[1]
    jieba.__version__ = "0.1"
    assert find_request(by_jieba)[1] != first


def test_without_jieba_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jieba", None)
    (tmp_path / "a.txt").write_text("我来到北京")
    config = build(CorpusConfig, {"path": str(tmp_path / "a.txt"), "chinese_words": "jieba"}, "test")
    with pytest.raises(ConfigError, match=r"chinese_words = 'jieba'.*pip install 'bertgpt_jax\[zh\]'"):
        prepare_corpus(config, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_real_jieba():
    pytest.importorskip("jieba", reason="the extra zh is not installed")
    chinese._segmenter.cache_clear()
    text = "我来到北京清华大学，卡拉OK 𠮷野家"
    inside = [text[i] for i in np.flatnonzero(chinese.inside_words(text))]
    assert inside == list("到京华大学拉家")
