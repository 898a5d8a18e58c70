"""All kinds of tokenizers: goldens of published vocabularies, training, saving, word starts, bad files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgpt_jax.corpus.config import ByteBPEConfig, CharactersConfig, SentencePieceConfig, WordPieceConfig
from bertgpt_jax.corpus.kinds import load_tokenizer, open_tokenizer, train_tokenizer
from bertgpt_jax.corpus.special import SPECIAL_TOKENS, TRAINED_IDS, SpecialIds
from bertgpt_jax.errors import ConfigError, DataError

WORDS = "the lower newest widest people wonder why tokens differ from words in strange and wonderful ways".split()
rng = np.random.default_rng(0)
TEXTS = tuple(" ".join(rng.choice(WORDS, 12)).capitalize() + ". Naïve café, 12 of 345!" for _ in range(200))
CONFIGS = {
    "wordpiece": WordPieceConfig(vocab_size=110),
    "byte_bpe": ByteBPEConfig(vocab_size=300),
    "sentencepiece": SentencePieceConfig(vocab_size=80),
    "characters": CharactersConfig(),
}
NASTY = "Hello wörld, don't[SEP] 12x 我想 🚀\u200d é नमस्ते\n\n  <|endoftext|> \x00 end"


@pytest.fixture(scope="module")
def trained():
    return {kind: train_tokenizer(TEXTS, config) for kind, config in CONFIGS.items()}


def golden(shared_data, name):
    stem = shared_data / "vocab" / "llama.cpp-golden" / f"ggml-vocab-{name}.gguf"
    inputs = stem.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    rows = stem.with_suffix(".gguf.out").read_text().split("\n")
    return [(text, [int(i) for i in row.split()]) for text, row in zip(inputs, rows, strict=True)]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt-2", ByteBPEConfig(path="gpt2")),
        ("bert-bge", WordPieceConfig(path="bert-base-uncased/vocab.txt")),
    ],
)
def test_published_vocabularies_match_golden_strings(shared_data, name, config):
    tokenizer = open_tokenizer(config.model_copy(update={"path": str(shared_data / "vocab" / config.path)}))
    rows = golden(shared_data, name)
    assert len(rows) == 47
    wrong = [(text, ids) for text, ids in rows if tokenizer.encode(text).tolist() != ids]
    assert wrong == []


def test_special_ids_of_published_vocabularies(shared_data):
    vocab = shared_data / "vocab"
    bert = open_tokenizer(WordPieceConfig(path=str(vocab / "bert-base-uncased")))
    assert bert.special == SpecialIds(pad=0, unk=100, cls=101, sep=102, mask=103, eot=102)
    gpt2 = open_tokenizer(ByteBPEConfig(path=str(vocab / "gpt2" / "vocab.bpe")))
    assert gpt2.special == SpecialIds(eot=50256)
    with pytest.raises(ConfigError, match="no cls, mask"):
        gpt2.special.require("cls", "mask", purpose="masked_lm")
    t5 = open_tokenizer(SentencePieceConfig(path=str(vocab / "t5")))
    assert (t5.special.pad, t5.special.eot, t5.special.unk) == (0, 1, 2)


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_is_reproducible_and_ids_are_ours(trained, kind):
    tokenizer = trained[kind]
    assert tokenizer.special == TRAINED_IDS
    assert [tokenizer.token(i) for i in range(6)] == list(SPECIAL_TOKENS)
    assert train_tokenizer(TEXTS, CONFIGS[kind]).sha256 == tokenizer.sha256
    assert train_tokenizer(TEXTS[:-1] + ("Other text zzz.",) * 9, CONFIGS[kind]).sha256 != tokenizer.sha256
    if kind != "characters":
        assert tokenizer.vocab_size == CONFIGS[kind].vocab_size


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_and_loaded_is_the_same(trained, kind, tmp_path):
    tokenizer = trained[kind]
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert (loaded.sha256, loaded.special) == (tokenizer.sha256, tokenizer.special)
    assert loaded.vocab_size == tokenizer.vocab_size
    for text in (*TEXTS[:5], NASTY, ""):
        assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
    reopened = open_tokenizer(CONFIGS[kind].model_copy(update={"path": str(tmp_path / "saved")}))
    assert reopened.sha256 == tokenizer.sha256


@pytest.mark.parametrize("kind", CONFIGS)
def test_text_never_becomes_a_special_token(trained, kind):
    ids = set(trained[kind].encode("".join(SPECIAL_TOKENS) + " <s> </s> <|endoftext|> [MASK]").tolist())
    assert not ids & (set(range(6)) - {TRAINED_IDS.unk})


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(), max_size=5))
def test_byte_bpe_and_sentences_round_trip(trained, texts):
    tokenizer = trained["byte_bpe"]
    ids, _ = tokenizer.encode_sentences(texts)
    assert tokenizer.decode(ids) == "".join(texts)


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.one_of(st.text(max_size=20), st.sampled_from([*TEXTS[:4], NASTY, "", " "])), max_size=6))
def test_batches_equal_single_texts_and_flags_mark_sentences(trained, kind, texts):
    tokenizer = trained[kind]
    ids, lengths = tokenizer.encode_batch(texts)
    single = [tokenizer.encode(text) for text in texts]
    assert lengths.tolist() == [len(row) for row in single]
    assert ids.tolist() == [i for row in single for i in row]
    flat, flags = tokenizer.encode_sentences(texts)
    begins = (np.cumsum(lengths) - lengths)[lengths > 0]
    assert flat.tolist() == ids.tolist()
    assert np.flatnonzero(flags & 2).tolist() == begins.tolist()
    assert (flags[begins] & 1).all()


def words(tokenizer, text):
    ids, flags = tokenizer.encode_sentences([text])
    starts = np.flatnonzero(flags & 1)
    return [tokenizer.decode(part) for part in np.split(ids, starts[1:])]


def test_words_begin_where_words_begin(trained, shared_data):
    text = "Wonderful newest people, they differ: 12 of  345\nnow"
    cut = ["Wonderful", " newest", " people", ",", " they", " differ", ":", " 12", " of", " ", " 345", "\n", "now"]
    assert words(trained["byte_bpe"], text) == cut
    assert words(trained["characters"], "people, they differ 12  345!") == [
        "people",
        ",",
        *cut[4:6],
        " 12",
        " ",
        " 345",
        "!",
    ]
    assert [w.strip() for w in words(trained["sentencepiece"], "newest people, 12")] == ["newest", "people", ",", "12"]
    assert words(trained["characters"], "the newest!") == ["the", " newest", "!"]
    gpt2 = open_tokenizer(ByteBPEConfig(path=str(shared_data / "vocab" / "gpt2")))
    assert words(gpt2, "naïve tokenizers 我想 go") == ["naïve", " tokenizers", " 我", "想", " go"]


def test_mask_and_coverage(trained):
    mask = trained["wordpiece"].special_mask()
    assert mask[:6].all() and not mask[6:].any()
    narrow = train_tokenizer(["aaaa bbbb " * 500 + "ẞ 1"] * 3, WordPieceConfig(vocab_size=14, character_coverage=0.99))
    assert narrow.special.unk in narrow.encode("ẞ").tolist()
    assert narrow.special.unk not in narrow.encode("1").tolist()  # ASCII is always kept


def test_switches_of_normalisation_are_separate():
    text = ["Élan vital " * 50]
    found = {}
    for lower in (True, False):
        for strip in (True, False):
            config = WordPieceConfig(vocab_size=24, lowercase=lower, strip_accents=strip)
            tokenizer = train_tokenizer(text, config)
            found[lower, strip] = tokenizer.decode(tokenizer.encode("Élan"))
    assert found == {(True, True): "elan", (True, False): "élan", (False, True): "Elan", (False, False): "Élan"}


def test_losses_are_counted(trained):
    lost = trained["wordpiece"].lost_characters("é é ñ नि x\u200b")
    assert lost["\u0301"] == 2 and lost["\u0303"] == 1 and "x" not in lost
    assert not trained["byte_bpe"].lost_characters("é\u200b")


def test_tokenizer_json_of_other_tools_is_read(trained, tmp_path):
    backend = trained["wordpiece"]._backend
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = open_tokenizer(WordPieceConfig(path=str(tmp_path / "tokenizer.json"), lowercase=False))
    assert loaded.sha256 == trained["wordpiece"].sha256
    trained["byte_bpe"]._backend.save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(ByteBPEConfig(path=str(tmp_path))).sha256 == trained["byte_bpe"].sha256


# ---------------------------------------------------------------- bad files


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


VOCAB = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n##s\n"


@pytest.mark.parametrize(
    ("config", "content", "words"),
    [
        (WordPieceConfig, "", ["vocab.txt is empty"]),
        (WordPieceConfig, VOCAB + "the\n", ["vocab.txt:8", "'the'", "line 6"]),
        (WordPieceConfig, VOCAB + "\nx\n", ["vocab.txt:8", "blank"]),
        (WordPieceConfig, VOCAB.replace("[UNK]", "unk"), ["no [UNK]"]),
        (WordPieceConfig, VOCAB.encode() + b"\xff\n", ["not UTF-8"]),
        (SentencePieceConfig, b"garbage", ["not a SentencePiece model"]),
        (SentencePieceConfig, b"", ["is empty"]),
        (CharactersConfig, "[1, 2]", ["JSON string"]),
        (CharactersConfig, '"unclosed', ["damaged"]),
    ],
)
def test_bad_vocabularies_are_explained(tmp_path, config, content, words):
    path = write(tmp_path / "vocab.txt", content)
    with pytest.raises(DataError) as error:
        open_tokenizer(config(path=path))
    assert path in str(error.value) and "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("config", [WordPieceConfig, ByteBPEConfig, SentencePieceConfig, CharactersConfig])
def test_missing_tokenizers_are_named(tmp_path, config):
    with pytest.raises((ConfigError, DataError), match="absent"):
        open_tokenizer(config(path=str(tmp_path / "absent")))


@pytest.mark.parametrize(
    ("tree", "rule"),
    [
        ("{", "damaged"),
        ("[]", "not an object"),
        ({}, "no model section"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "WordPiece model where BPE"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "not byte-level"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}},
            "256 bytes",
        ),
    ],
)
def test_bad_tokenizer_json(tmp_path, tree, rule):
    path = write(tmp_path / "tokenizer.json", tree if isinstance(tree, str) else json.dumps(tree))
    with pytest.raises(DataError, match=rule):
        open_tokenizer(ByteBPEConfig(path=path))


def test_crlf_vocabulary_is_read(tmp_path):
    path = write(tmp_path / "vocab.txt", VOCAB.replace("\n", "\r\n"))
    assert open_tokenizer(WordPieceConfig(path=path)).encode("the thes").tolist() == [5, 5, 6]


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (WordPieceConfig(vocab_size=20), "too small"),
        (WordPieceConfig(vocab_size=20_000), r"at most \d+; set vocab_size=\d+"),
        (ByteBPEConfig(vocab_size=20_000), r"at most \d+; set vocab_size=\d+"),
        (SentencePieceConfig(vocab_size=20_000), r"at most \d+; set vocab_size=\d+"),
        (SentencePieceConfig(vocab_size=20), r"too small, .* take \d+"),
    ],
)
def test_sizes_that_do_not_fit_the_text(config, rule):
    with pytest.raises(DataError, match=rule) as error:
        train_tokenizer(TEXTS, config)
    assert f"tokenizer.vocab_size = {config.vocab_size}" in str(error.value)


@pytest.mark.parametrize("kind", ["wordpiece", "sentencepiece", "characters"])
def test_training_on_nothing(kind):
    with pytest.raises(DataError, match="training text is empty"):
        train_tokenizer([""], CONFIGS[kind])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("bad", [-1, 10**6])
def test_ids_outside_the_vocabulary(trained, kind, bad):
    with pytest.raises(DataError, match=f"id {bad} at position 1.*{trained[kind].vocab_size - 1}"):
        trained[kind].decode([7, bad])


def test_flipped_bits_of_a_model_never_crash(trained, tmp_path):
    model = bytearray(trained["sentencepiece"].files["spiece.model"])
    for position in range(0, len(model), max(1, len(model) // 40)):
        changed = bytearray(model)
        changed[position] ^= 1 << (position % 8)
        try:
            open_tokenizer(SentencePieceConfig(path=write(tmp_path / "m.model", bytes(changed)))).encode("the newest")
        except (DataError, ConfigError) as error:
            assert "m.model" in str(error)
