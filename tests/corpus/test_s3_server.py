"""Sources in a bucket and a corpus in a bucket, through the real clients and an S3 server (moto) on this machine."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

SETTINGS = ["format=text", "shard_bytes=16000", "workers=2", "tokenizer.kind=byte_bpe", "tokenizer.vocab_size=280"]
BUCKET = """
import sys, pathlib, s3fs
action, bucket, folder = sys.argv[1:]
files, folder = s3fs.S3FileSystem(), pathlib.Path(folder)
if action == "put":
    files.mkdir(bucket)
    for path in folder.iterdir():
        files.put(str(path), f"{bucket}/text/{path.name}")
else:
    for key in files.find(f"{bucket}/corpus"):
        path = folder / key.removeprefix(f"{bucket}/corpus/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files.cat(key))
"""


@pytest.fixture(scope="module")
def s3_python() -> str:
    """An interpreter that has moto and s3fs: `BERTGPT_S3_PYTHON`, or this one; skips where there is none."""
    here = all(importlib.util.find_spec(name) for name in ("moto", "flask", "s3fs"))
    given = os.environ.get("BERTGPT_S3_PYTHON") or (sys.executable if here else "")
    if not given:
        pytest.skip("no S3 server here; set BERTGPT_S3_PYTHON to a python with requirements-s3-server.txt")
    return given


@pytest.fixture
def environment(s3_python: str, repository: Path) -> Iterator[dict[str, str]]:
    """The variables that lead S3's clients to a server that runs meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = dict(os.environ, PYTHONPATH=str(repository), PYTHONDONTWRITEBYTECODE="1", AWS_REGION="us-east-1")
    found |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    found["AWS_ENDPOINT_URL"] = address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([s3_python, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL, env=found)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.1)
        yield found
    finally:
        server.kill()
        server.wait()


def files(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    found.pop("plan.json", None)  # holds the addresses of the sources
    return found


@pytest.mark.slow
def test_prepare_from_a_bucket_to_a_bucket(s3_python, repository, environment, tmp_path):
    def run(*command: str, code: int = 0) -> str:
        done = subprocess.run([s3_python, *command], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr[-3000:]
        return done.stdout + done.stderr

    text, prepare = tmp_path / "text", str(repository / "tools" / "prepare.py")
    text.mkdir()
    for i in range(3):
        rows = (f"Text {i}.{k} of the test. It has words: {'so on ' * (k % 20)}" for k in range(150))
        (text / f"{i}.txt").write_text("\n\n".join(rows))
    run("-c", BUCKET, "put", "bucket", str(text))
    run(prepare, "s3://bucket/text/*.txt", "--quiet", "--out", "s3://bucket/corpus", *SETTINGS)
    assert "every sha256 matches" in run(prepare, "--check", "s3://bucket/corpus")
    run(prepare, str(text), "--quiet", "--out", str(tmp_path / "local"), *SETTINGS)
    run("-c", BUCKET, "get", "bucket", str(tmp_path / "fetched"))
    expected = files(tmp_path / "local")
    assert len(expected) > 30 and files(tmp_path / "fetched") == expected
    said = run(prepare, "s3://bucket/nothing", "--out", "s3://bucket/other", code=78)
    assert "s3://bucket/nothing" in said and "no file matches" in said
    assert "s3://missing" in run(prepare, str(text), "--quiet", "--out", "s3://missing/c", *SETTINGS, code=74)
