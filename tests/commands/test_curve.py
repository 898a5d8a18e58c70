"""`tools/curve.py`: pictures and numbers from metrics.jsonl."""

from __future__ import annotations

import json

import pytest

from bertgpt_jax.commands.curve import main


@pytest.fixture
def workdir(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    rows = [{"step": s, "train/loss": 3.0 / s, "eval/loss": 3.5 / s} for s in (1, 2, 3)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 4, "train/lo')
    return directory


def test_picture_and_numbers(workdir, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out" / "curve.png"
    assert main([str(workdir), "--out", str(out), "--line", "unigram=6.2"]) == 0
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert numbers["runs"]["run"]["eval/loss"] == [[1, 3.5], [2, 1.75], [3, 3.5 / 3]]
    assert numbers["lines"] == {"unigram": 6.2}
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, code, words",
    [(["--out", "x.pdf"], 64, "x.pdf"), (["--out", "x.png", "--line", "a=b"], 64, "a=b")],
)
def test_bad_arguments(workdir, capsys, arguments, code, words):
    assert main([str(workdir), *arguments]) == code
    assert words in capsys.readouterr().err


def test_a_workdir_without_rows_is_named(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "x.png")]) == 65
    assert str(tmp_path) in capsys.readouterr().err
