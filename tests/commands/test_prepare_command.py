"""`prepare`: from files to a corpus, its settings, its checks, its errors."""

from __future__ import annotations

import json

import pytest

from bertgpt_jax.commands.prepare import main
from bertgpt_jax.corpus.reader import CorpusReader

SETTINGS = ["format=text", "tokenizer.kind=characters", "workers=0", "held_out.fraction=0"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One sentence. Two.\n\nAnother text.")
    return str(path)


def test_text_to_corpus(source, tmp_path, capsys):
    out = tmp_path / "corpus"
    assert main([source, "--out", str(out), *SETTINGS]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(out)
    for word in ("documents  2", "sentences  3", "unknown    0", "tokens/s", "MB"):
        assert word in shown.err
    assert CorpusReader(out).manifest["totals"]["documents"] == 2
    assert main(["--check", str(out)]) == 0
    assert "every sha256 matches" in capsys.readouterr().out


def test_quiet_says_nothing(source, tmp_path, capsys):
    assert main([source, "--quiet", "--out", str(tmp_path / "c"), *SETTINGS]) == 0
    assert capsys.readouterr().err == ""


def test_settings_are_printed_and_read_back(source, tmp_path, capsys):
    assert main([source, *SETTINGS]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["tokenizer"]["kind"] == "characters"
    (tmp_path / "settings.json").write_text(printed)
    assert main(["--config", str(tmp_path / "settings.json"), "seed=3"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(printed) | {"seed": 3}


def test_several_sources(source, tmp_path):
    (tmp_path / "b.txt").write_text("Third.")
    assert main([source, str(tmp_path / "b.txt"), "--out", str(tmp_path / "c"), "--quiet", *SETTINGS]) == 0
    assert CorpusReader(tmp_path / "c").manifest["sources"]["name"] == ["a.txt", "b.txt"]


def test_check_finds_a_changed_chunk(source, tmp_path, capsys):
    assert main([source, "--out", str(tmp_path / "c"), "--quiet", *SETTINGS]) == 0
    file = next((tmp_path / "c").glob("shard-*/doc_hash/c/0"))
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(bytes(data))
    capsys.readouterr()
    assert main(["--check", str(tmp_path / "c")]) == 65
    assert "doc_hash: damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--out", "OUT"], 78, "corpus.path is empty"),
        (["/nowhere.txt", "--out", "OUT"], 78, "'/nowhere.txt'"),
        (["SOURCE", "--out", "OUT", "tokeniser.kind=characters"], 78, "did you mean 'tokenizer'"),
        (["SOURCE", "--out", "OUT", "tokenizer.vocab_size=3"], 78, "tokenizer.vocab_size = '3'"),
        (["SOURCE", "--out", "OUT", "held_out.fraction=1"], 78, "held_out.fraction = '1'"),
        (["SOURCE", "--out", "OUT", "workers=-2"], 78, "workers = '-2'"),
        (["SOURCE", "--out", "OUT", "shard_bytes=10"], 78, "shard_bytes = '10'"),
        (["SOURCE", "--out", "OUT", "tokenizer.path=/no/vocab.txt"], 78, "/no/vocab.txt not found"),
        (["SOURCE", "--out", "OUT", "tokenizer.vocab_size=9000"], 65, "vocab_size = 9000: this text supports at most"),
        (["--config", "/no.json"], 64, "/no.json"),
        (["--check", "/nowhere"], 65, "/nowhere"),
        (["SOURCE", "--nonsense"], 64, "--nonsense"),
    ],
)
def test_errors_are_one_line_with_their_code(source, tmp_path, capsys, arguments, code, words):
    names = {"SOURCE": source, "OUT": str(tmp_path / "out")}
    assert main([names.get(a, a) for a in arguments]) == code
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1 and shown.startswith("error: ")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_interrupted_work_is_named(source, tmp_path, capsys):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "plan.json").write_text("{")
    assert main([source, "--out", str(tmp_path / "c"), *SETTINGS]) == 74
    assert "plan.json" in capsys.readouterr().err
