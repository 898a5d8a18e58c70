"""`prepare --runner`: Apache Beam in an environment of its own writes the bytes that the process pool writes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bertgpt_jax.commands.prepare import main
from bertgpt_jax.corpus import beam
from bertgpt_jax.corpus.builder import prepare_corpus
from bertgpt_jax.corpus.config import ByteBPEConfig, CorpusConfig
from bertgpt_jax.errors import ConfigError, DataError, PeerError

SETTINGS = ["format=jsonl", "shard_bytes=20000", "workers=2", "tokenizer.kind=byte_bpe", "tokenizer.vocab_size=280"]


@pytest.fixture(scope="module")
def beam_python() -> str:
    """An interpreter that has Apache Beam: `BERTGPT_BEAM_PYTHON`, or this one; skips where there is none."""
    given = os.environ.get("BERTGPT_BEAM_PYTHON") or (sys.executable if importlib.util.find_spec("apache_beam") else "")
    if not given:
        pytest.skip("no Apache Beam here; set BERTGPT_BEAM_PYTHON to a python with requirements-beam.txt")
    return given


def write_rows(path: Path, rows: int) -> Path:
    path.write_text("".join(f'{{"text": "Row {i} says: {"so on, " * (i % 50)}until {i * i}."}}\n' for i in range(rows)))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(python: str, repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = dict(os.environ, PYTHONPATH=str(repository), PYTHONDONTWRITEBYTECODE="1")
    command = [python, str(repository / "tools" / "prepare.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("filters.duplicates=drop",)], ids=["all", "without duplicates"])
def test_beam_writes_the_same_bytes(more, beam_python, repository, tmp_path):
    source = write_rows(tmp_path / "a.jsonl", 900)
    rows = source.read_text().splitlines(keepends=True)
    source.write_text("".join([*rows, *rows[5:300]]))  # the repeats lie in other shards
    settings = [*SETTINGS, *more]
    assert main([str(source), "--quiet", "--out", str(tmp_path / "pool"), *settings]) == 0
    arguments = [str(source), "--quiet", "--out", str(tmp_path / "beam"), "--runner", "direct", *settings]
    done = run(beam_python, repository, *arguments, "--", "--direct_num_workers=2")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = contents(tmp_path / "pool")
    assert len([name for name in expected if name.endswith("done.json")]) > 4
    assert json.loads(expected["manifest.json"])["cleaning"].get("duplicates", 0) == (295 if more else 0)
    found = contents(tmp_path / "beam")
    places = [json.loads(corpus.pop("plan.json"))["duplicates"] for corpus in (expected, found)]
    assert found == expected and all(places) == bool(more)


@pytest.mark.slow
def test_errors_of_a_worker_arrive(beam_python, repository, tmp_path):
    source = write_rows(tmp_path / "a.jsonl", 400)
    source.write_text(source.read_text() + '{"body": "no text"}\n')
    words = [tmp_path / "words.txt"]
    words[0].write_text("so on, until Row says 0123456789. " * 30)
    tokenizer = prepare_corpus(
        CorpusConfig(path=str(words[0]), workers=0, tokenizer=ByteBPEConfig(vocab_size=270)), tmp_path / "t", False
    )
    settings = [*SETTINGS[:-1], f"tokenizer.path={tokenizer / 'tokenizer'}"]
    done = run(
        beam_python, repository, str(source), "--quiet", "--out", str(tmp_path / "c"), "--runner", "direct", *settings
    )
    assert done.returncode == DataError.exit_code, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "a.jsonl:401" in last and "'text'" in last
    assert not (tmp_path / "c" / "manifest.json").exists()


# ---------------------------------------------------------------- without Beam


def test_beams_options_need_a_runner(tmp_path, capsys):
    source = write_rows(tmp_path / "a.jsonl", 3)
    assert main([str(source), "--out", str(tmp_path / "c"), "--", "--project=p"]) == 64
    assert "--project=p" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_a_missing_beam_is_explained(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)  # not importable, whatever is installed
    source = write_rows(tmp_path / "a.jsonl", 30)
    small = ["tokenizer.kind=characters"]
    assert (
        main([str(source), "--quiet", "--out", str(tmp_path / "c"), "--runner", "flink", *SETTINGS[:3], *small]) == 78
    )
    error = capsys.readouterr().err
    assert "--runner flink" in error and "requirements-beam.txt" in error and error.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_files_of_this_machine_are_not_for_dataflow(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(beam, "require_beam", lambda runner: None)
    source = write_rows(tmp_path / "a.jsonl", 30)
    small = ["tokenizer.kind=characters"]
    assert (
        main([str(source), "--quiet", "--out", str(tmp_path / "c"), "--runner", "dataflow", *SETTINGS[:3], *small])
        == 78
    )
    error = capsys.readouterr().err
    assert str(tmp_path / "c") in error and "gs://" in error


def test_one_shard_is_written_once(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", 300)
    seen: list[list[int]] = []

    def twice(out, shards):
        seen.append(list(shards))
        for index in [*shards, *shards]:  # a runner may try a shard again that was finished
            beam.tokenise_one(index, str(out))
            seen.append([(out / f"shard-{index:05d}-of-{len(shards):05d}" / "done.json").stat().st_mtime_ns])

    config = CorpusConfig(path=str(source), shard_bytes=20_000, workers=0, tokenizer=ByteBPEConfig(vocab_size=280))
    made = prepare_corpus(config, tmp_path / "a", False, elsewhere=twice)
    count = len(seen[0])
    assert count > 1 and seen[1 : count + 1] == seen[count + 1 :]
    assert contents(made) == contents(prepare_corpus(config, tmp_path / "b", False))


OURS = "x\nbertgpt_jax.errors.DataError: a.jsonl:3: bad [while running 'Map(f)-ptransform-3']\n\nmore"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (OURS, DataError, "a.jsonl:3: bad"),
        ("bertgpt_jax.errors.ConfigError: no\nTraceback", ConfigError, "no"),
        ("Something: else\nlast", PeerError, "--runner spark: RuntimeError: last; the same command continues"),
        ("bertgpt_jax.errors.Unheard: x", PeerError, "the same command continues"),
    ],
)
def test_errors_are_read_from_what_runners_say(text, kind, message):
    found = beam._plain(RuntimeError(text), "spark")
    assert type(found) is kind and "\n" not in str(found)
    assert str(found) == message if kind is not PeerError else message in str(found)
