"""`tokenizer train|encode|decode|check`."""

from __future__ import annotations

import io

import pytest

from bertgpt_jax.commands.tokenizer import main
from bertgpt_jax.corpus.kinds import load_tokenizer

TEXT = "\n\n".join(f"The naïve reader counts {i} words, and then some more of them." for i in range(60))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def trained(source, tmp_path, capsys):
    out = str(tmp_path / "tok")
    assert main(["train", source, "--out", out, "tokenizer.kind=byte_bpe", "tokenizer.vocab_size=300"]) == 0
    capsys.readouterr()
    return out


def test_train_encode_decode(trained, capsys, monkeypatch):
    assert main(["encode", trained, "the words"]) == 0
    ids = capsys.readouterr().out
    assert main(["decode", trained, *ids.split()]) == 0
    assert capsys.readouterr().out == "the words\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("one line\nanother\n"))
    assert main(["encode", trained]) == 0
    lines = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["decode", trained]) == 0
    assert capsys.readouterr().out == "one line\nanother\n"


def test_pieces_mark_words(trained, capsys):
    assert main(["encode", trained, "reader of", "--pieces"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("|") == 2 and shown.replace(" ", "").replace("|", "").replace("Ġ", " ").strip() == "reader of"


def test_sample_limits_the_documents(source, tmp_path, capsys):
    assert main(["train", source, "--out", str(tmp_path / "t"), "--sample", "7", "tokenizer.kind=characters"]) == 0
    assert "on 7 documents" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "t").vocab_size < 6 + len(set(TEXT))


def test_check_counts_what_normalisation_loses(source, tmp_path, capsys):
    out = str(tmp_path / "wp")
    assert main(["train", source, "--out", out, "tokenizer.vocab_size=70"]) == 0
    assert main(["check", out, source]) == 0
    shown = capsys.readouterr().out
    documents = int(shown.split("pieces, on ")[1].split()[0])
    assert f"Mn  {documents}: U+0308 COMBINING DIAERESIS {documents}" in shown
    assert f"warning: {documents} combining marks are lost" in shown
    assert f"0 of {documents} documents decode to themselves" in shown


def test_check_of_a_lossless_tokenizer(trained, source, capsys):
    assert main(["check", trained, source, "--sample", "5"]) == 0
    shown = capsys.readouterr().out
    assert "5 of 5 documents decode to themselves" in shown
    assert "lost        0 characters" in shown and "warning" not in shown


def test_published_files_by_kind(tmp_path, capsys):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nÉlan\nelan\n")
    path = str(tmp_path / "vocab.txt")
    assert main(["encode", path, "Élan", "--kind", "wordpiece"]) == 0
    assert main(["encode", path, "Élan", "--kind", "wordpiece", "--cased"]) == 0
    assert capsys.readouterr().out == "6\n5\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 64, "train|encode|decode|check"),
        (["trian"], 64, "'trian'"),
        (["train", "SOURCE"], 64, "--out"),
        (["train", "SOURCE", "--out", "NEW", "--sample", "0"], 64, "--sample 0"),
        (["train", "SOURCE", "--out", "TOK"], 78, "not empty"),
        (["train", "/nowhere", "--out", "NEW"], 78, "'/nowhere'"),
        (["train", "SOURCE", "--out", "NEW", "tokenizer.path=x"], 64, "tokenizer.path = 'x'"),
        (["train", "SOURCE", "--out", "NEW", "tokenizer.kind=bpe"], 78, "bpe"),
        (["decode", "TOK", "12", "x"], 64, "'12 x'"),
        (["decode", "TOK", "300"], 65, "id 300 at position 0 is outside the vocabulary 0..299"),
        (["decode", "TOK", "--", "-1"], 65, "id -1"),
        (["encode", "/nowhere", "x"], 78, "/nowhere is no saved tokenizer"),
        (["encode", "/nowhere.txt", "x", "--kind", "wordpiece"], 78, "/nowhere.txt not found"),
        (["encode", "TOK", "x", "--kind", "nonsense"], 78, "nonsense"),
        (["check", "TOK", "SOURCE", "--kind", "wordpiece"], 65, "byte_bpe"),
    ],
)
def test_errors_are_one_line_with_their_code(trained, source, tmp_path, capsys, arguments, code, words):
    names = {"SOURCE": source, "TOK": trained, "NEW": str(tmp_path / "new")}
    assert main([names.get(a, a) for a in arguments]) == code
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1 and shown.startswith("error: ")
    assert not (tmp_path / "new").exists()
