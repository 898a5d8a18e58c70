"""Standard input as a source."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bertgpt_jax.corpus.builder import open_corpus
from bertgpt_jax.corpus.config import CharactersConfig, CorpusConfig, HashSplit
from bertgpt_jax.corpus.files import find_files
from bertgpt_jax.corpus.stdin import spooled
from bertgpt_jax.errors import ConfigError, DataError

TEXT = b"First.\n\nSecond.\n\nThird.\n"
SETTINGS = ["tokenizer.kind=characters", "held_out.fraction=0", "workers=0", "sentences=line"]


def config(**changes) -> CorpusConfig:
    base = {"path": "-", "workers": 0, "tokenizer": CharactersConfig(), "held_out": HashSplit(fraction=0)}
    return CorpusConfig(**(base | changes))


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("data", [TEXT, gzip.compress(TEXT, mtime=0)], ids=["plain", "gzip"])
def test_it_is_kept_as_a_file_and_read_from_there(data, tmp_path, monkeypatch):
    feed(monkeypatch, data)
    reader = open_corpus(config(), tmp_path / "corpora", False)
    assert reader.manifest["totals"]["documents"] == 3
    kept = [p for p in (tmp_path / "corpora").iterdir() if p.is_file()]
    assert [p.name[:6] for p in kept] == ["stdin-"] and kept[0].read_bytes() == data
    feed(monkeypatch, data)
    assert open_corpus(config(), tmp_path / "corpora", False).path == reader.path
    assert open_corpus(config(path=str(kept[0])), tmp_path / "corpora", False).path == reader.path


def test_another_input_is_another_source(tmp_path):
    one, two = (spooled(config(), tmp_path, io.BytesIO(TEXT + end)).path for end in (b"", b"Fourth.\n"))
    assert one != two and Path(one).read_bytes() == TEXT
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((Path(one).name, Path(two).name))


def test_large_input_passes_in_blocks(tmp_path):
    data = os.urandom(3_000_001)
    assert Path(spooled(config(), tmp_path, io.BytesIO(data)).path).read_bytes() == data


def test_other_paths_read_nothing(tmp_path):
    stream = io.BytesIO(TEXT)
    assert spooled(config(path="a.txt"), tmp_path, stream) == config(path="a.txt") and stream.tell() == 0


def test_empty_input_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="corpus.path = '-': standard input is empty; pipe text into the command$"):
        spooled(config(), tmp_path, io.BytesIO(b""))
    assert not list(tmp_path.iterdir())
    earlier = spooled(config(), tmp_path, io.BytesIO(TEXT)).path
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match=f"corpus.path={earlier}, kept from before"):
        spooled(config(), tmp_path)


def test_it_stands_alone():
    for path in (("-", "a.txt"), "-"):
        with pytest.raises(ConfigError, match="'-' stands alone"):
            find_files(config(path=path))


@pytest.mark.slow
def test_the_command_reads_a_pipe_and_is_started_again(repository, tmp_path):
    """Killed before its shard was written, the same pipe again: the build goes on where it was."""
    command = [sys.executable, str(repository / "tools" / "prepare.py"), "-", "--out", "corpus", *SETTINGS]
    environment = os.environ | {"PYTHONPATH": str(repository)}

    def run(data: bytes) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(command, input=data, cwd=tmp_path, env=environment, capture_output=True, timeout=100)

    empty = run(b"")
    assert empty.returncode == 65 and empty.stderr.count(b"\n") == 1 and b"standard input is empty" in empty.stderr
    assert not list(tmp_path.iterdir())
    assert run(TEXT).returncode == 0
    (tmp_path / "corpus" / "manifest.json").unlink()
    again = run(TEXT)
    assert again.returncode == 0 and b"continuing: 1 of 1 shards are finished" in again.stderr
    other = run(TEXT + b"More.\n")
    assert other.returncode == 78 and b"other sources or settings" in other.stderr
