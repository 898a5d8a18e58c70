"""A corpus of 100,000 shards and 10^12 tokens opens at once and in little memory; only its manifest is real."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bertgpt_jax.corpus.reader import content_fingerprint

SHARDS, TOKENS = 100_000, 10**12
SECONDS, BYTES = 2.0, 500e6

_OPEN = """
import json, sys, time
import numpy as np
from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.windows import Windows
from bertgpt_jax.corpus.memory import peak_resident_bytes
from bertgpt_jax.corpus.reader import CorpusReader

begun = time.process_time()  # of the processor: the machine may be busy
reader = CorpusReader(sys.argv[1])
opened = time.process_time() - begun
train = Dataset(reader, Windows(), None, sequence_length=2048, batch_size=1536, seed=3)
held_out = Dataset(reader, Windows(), None, split="held_out", sequence_length=2048, batch_size=1536)
ready = time.process_time() - begun
rows = train._rows
ranks = np.array([0, 1, rows.count(0) // 2, rows.count(0) - 1])
starts, lengths = rows.spans(0, rows.order(0, ranks))
print(json.dumps({
    "opened": opened, "ready": ready, "peak": peak_resident_bytes(),
    "tokens": int(reader.token_base[-1]), "rows": rows.count(0), "held_out": held_out.eval_rows(),
    "starts": starts.ravel().tolist(), "lengths": lengths.ravel().tolist(),
}))
"""


def write_manifest(out: Path) -> None:
    """A manifest of `SHARDS` shards, each 1/1000 held out, and their empty directories."""
    tokens = [TOKENS // SHARDS + (i % 2) - (i % 2 == 0) for i in range(SHARDS)]
    held_out = [n // 1000 for n in tokens]
    columns = {
        "documents": [n // 800 for n in tokens],
        "train_documents": [n // 800 - h // 800 for n, h in zip(tokens, held_out, strict=True)],
        "tokens": tokens,
        "train_tokens": [n - h for n, h in zip(tokens, held_out, strict=True)],
        "bytes": [4 * n for n in tokens],
        "train_bytes": [4 * (n - h) for n, h in zip(tokens, held_out, strict=True)],
        "sentences": tokens,
        "unknown": [0] * SHARDS,
        "sha256": [hashlib.sha256(str(i).encode()).hexdigest() for i in range(SHARDS)],
    }
    special = dict.fromkeys(("pad", "unk", "cls", "sep", "mask")) | {"eot": 50256}
    manifest = {
        "format_version": 1,
        "request": "0" * 64,
        "tokenizer": {"sha256": "1" * 64, "vocab_size": 50257, "special": special},
        "sources": {"name": [f"part-{i:06d}.txt.gz" for i in range(SHARDS)]},
        "shards": columns,
    }
    manifest["fingerprint"] = content_fingerprint(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    for i in range(SHARDS):
        os.mkdir(out / f"shard-{i:05d}-of-{SHARDS}")


@pytest.mark.slow
def test_a_trillion_tokens(tmp_path: Path, repository: Path) -> None:
    write_manifest(tmp_path)

    def open_it() -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", _OPEN, str(tmp_path)]
        environment = os.environ | {"PYTHONPATH": str(repository)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = open_it()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == TOKENS and found["peak"] < BYTES
    assert found["opened"] < found["ready"] < SECONDS, "the batches of a run included"
    assert found["rows"] == sum((n - n // 1000 - 1) // 2048 for n in (TOKENS // SHARDS - 1, TOKENS // SHARDS + 1)) * (
        SHARDS // 2
    )
    assert found["lengths"] == [2049] * 4 and len(set(found["starts"])) == 4
    assert all(0 <= start < TOKENS for start in found["starts"]) and found["held_out"] > 0
    os.rmdir(tmp_path / f"shard-77777-of-{SHARDS}")
    assert f"1 of 100000 shards are missing: shard-77777-of-{SHARDS}" in open_it().stderr
