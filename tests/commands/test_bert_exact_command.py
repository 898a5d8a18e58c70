"""`bert_exact`: its lines, its flags and its errors."""

from __future__ import annotations

import gzip
import json

import pytest

from bertgpt_jax.commands.bert_exact import main

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefA"]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (tmp_path / "text.txt").write_text("a b c\nd e A\n\nf a b\nc d\ne\n")
    return [str(tmp_path / "text.txt"), "--vocab", str(tmp_path / "vocab.txt")]


def test_the_published_sample(shared_data, capsys):
    text = shared_data / "lm" / "bert-sample-text" / "sample_text.txt"
    vocabulary = shared_data / "vocab" / "bert-base-uncased" / "vocab.txt"
    flags = "--max-seq-length 128 --max-predictions 20 --dupe-factor 5 --seed 12345 --whole-word"
    assert main([str(text), "--vocab", str(vocabulary), *flags.split()]) == 0
    golden = "sample_text.L128.mp20.dupe5.seed12345.whole_word.jsonl.gz"
    expected = gzip.decompress((shared_data / "golden" / "bert_exact" / golden).read_bytes()).decode()
    shown = capsys.readouterr()
    assert shown.out == expected
    assert "64 instances of 3 documents" in shown.err


def test_every_flag_reaches_the_instances(files, capsys):
    def run(*flags: str) -> list[dict]:
        assert main([*files, *flags]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    plain = run()
    names = {"tokens", "segment_ids", "is_random_next", "masked_lm_positions", "masked_lm_labels"}
    assert all(row.keys() == names for row in plain)
    assert len(run("--dupe-factor", "3")) < len(plain)
    assert run("--seed", "1") != plain
    assert max(len(row["tokens"]) for row in run("--max-seq-length", "6")) == 6
    assert all(len(row["masked_lm_positions"]) == 1 for row in run("--max-predictions", "1"))
    assert all(len(row["masked_lm_positions"]) == 2 for row in run("--masked-lm-prob", "0.9", "--max-predictions", "2"))
    assert "A" in {label for row in run("--cased", "--masked-lm-prob", "0.9") for label in row["masked_lm_labels"]}
    assert run("--short-seq-prob", "1") != plain


@pytest.mark.parametrize(
    "change, code, message",
    [
        (["--max-seq-length", "4"], 78, "max_seq_length = 4"),
        (["--dupe-factor", "0"], 78, "dupe_factor = 0"),
        (["--max-predictions", "-1"], 78, "max_predictions = -1"),
        (["--masked-lm-prob", "nan"], 78, "masked_lm_prob = nan"),
        (["--short-seq-prob", "1.5"], 78, "short_seq_prob = 1.5"),
        (["--seed", "x"], 64, "'x'"),
        (["--vocab", "none.txt"], 64, "--vocab none.txt: no such file"),
    ],
)
def test_bad_flags(files, capsys, change, code, message):
    assert main([*files, *change]) == code
    shown = capsys.readouterr()
    assert shown.out == "" and message in shown.err and shown.err.count("\n") == 1


@pytest.mark.parametrize(
    "content, code, message",
    [(b"", 65, "no document"), (b"a\n\xff\n", 65, "text.txt:2: byte 0xff"), (None, 74, "text.txt")],
)
def test_bad_texts(files, tmp_path, capsys, content, code, message):
    (tmp_path / "text.txt").unlink()
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    assert main(files) == code
    shown = capsys.readouterr()
    assert shown.out == "" and message in shown.err and shown.err.count("\n") == 1
