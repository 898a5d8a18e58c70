"""What a large build must keep: memory that does not grow with the text, and the same bytes after any kill."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bertgpt_jax.corpus.builder import prepare_corpus
from bertgpt_jax.corpus.config import ByteBPEConfig, CorpusConfig

rng = np.random.default_rng(3)
WORDS = ["".join(rng.choice(list("abcdefghijklmnoprstu"), rng.integers(2, 9))) for _ in range(20_000)]


def paragraph(number: int) -> str:
    chosen = np.random.default_rng(number).integers(0, len(WORDS), 120)
    return " ".join(WORDS[i] for i in chosen).capitalize() + "."


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    block = "\n\n".join(paragraph(i) for i in range(1500)) + "\n\n"
    peaks = []
    for repeats in (4, 28):
        source = tmp_path / f"{repeats}.txt"
        with open(source, "w") as stream:
            for _ in range(repeats):
                stream.write(block)
        lines: list[str] = []
        settings = CorpusConfig(
            path=str(source),
            workers=1,
            shard_bytes=2_000_000,
            tokenizer=ByteBPEConfig(vocab_size=1000, sample_bytes=1_000_000),
        )
        prepare_corpus(settings, tmp_path / f"c{repeats}", progress=lines.append)
        found = re.search(r"memory +([\d,]+) MB a worker", "\n".join(lines))
        assert found, lines
        peaks.append(int(found[1].replace(",", "")))
    assert peaks[1] < 1.1 * peaks[0] + 5 and peaks[1] < 400


@pytest.mark.slow
def test_killed_five_times_and_restarted_gives_the_same_bytes(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for k in range(16):
        (folder / f"{k:02}.txt").write_text("\n\n".join(paragraph(1000 * k + i) for i in range(80)))
    tokenizer = ByteBPEConfig(vocab_size=400)
    settings = CorpusConfig(path=str(folder), shard_bytes=70_000, workers=2, tokenizer=tokenizer)
    whole = files(prepare_corpus(settings, tmp_path / "whole", progress=False))
    (tmp_path / "config.json").write_text(settings.model_dump_json())
    out = tmp_path / "killed"
    code = "from bertgpt_jax.commands.prepare import main; main()"
    command = [sys.executable, "-c", code, "--config", str(tmp_path / "config.json"), "--out", str(out)]
    for kill in range(5):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(out.glob("shard-*/done.json"))) < 2 * kill and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.002)
        if kill == 0:  # before the first shard: in the planning, or while the tokenizer is trained
            time.sleep(1.0)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "manifest.json").exists()
    time.sleep(1)  # orphans notice that their parent is gone
    prepare_corpus(settings, out, progress=False)
    assert len([name for name in whole if name.endswith("done.json")]) >= 16
    assert files(out) == whole
