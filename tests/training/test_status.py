"""One run a workdir: the lock names its holder, outlives no process, and is taken over when stale; STATUS.json."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from bertgpt_jax.errors import ConfigError, StorageError
from bertgpt_jax.training import status
from bertgpt_jax.training.status import acquire, read_status, write_status


def _write_lock(workdir: Path, **changes: Any) -> None:
    entry = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": status._process_start(os.getpid()),
        "since": "2026-01-02T03:04:05+00:00",
        "seen": time.time(),
        "token": "somebody",
    }
    (workdir / "run.lock").write_text(json.dumps({**entry, **changes}))


def test_second_run_is_told_who_holds_the_workdir(tmp_path: Path) -> None:
    with acquire(epath.Path(tmp_path)):
        before = (tmp_path / "run.lock").read_bytes()
        with pytest.raises(ConfigError, match=f"locked by host {socket.gethostname()}, pid {os.getpid()}, since 20"):
            acquire(epath.Path(tmp_path))
        assert (tmp_path / "run.lock").read_bytes() == before
    assert not (tmp_path / "run.lock").exists()
    acquire(epath.Path(tmp_path)).release()


def test_a_living_process_of_this_host_holds_it_however_old_the_lock(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"],
                          stdout=subprocess.PIPE) as child:  # fmt: skip
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        _write_lock(tmp_path, pid=child.pid, process_start=status._process_start(child.pid), seen=0.0)
        with pytest.raises(ConfigError, match=f"pid {child.pid}, since 2026-01-02T03:04:05"):
            acquire(epath.Path(tmp_path))
        child.kill()
        child.wait()
    lock = acquire(epath.Path(tmp_path))
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    lock.release()


@pytest.mark.parametrize(
    "stale",
    [
        {"pid": 2**22 + 1},
        {"process_start": 1},
        {"host": "another", "seen": 0.0},
        {"pid": "x"},
        {"seen": None},
    ],
    ids=["dead", "pid used again", "other host gone silent", "no lock of ours", "no time"],
)
def test_stale_locks_are_taken_over(stale: dict[str, Any], tmp_path: Path) -> None:
    if "process_start" in stale and status._process_start(os.getpid()) is None:
        pytest.skip("no /proc to tell a reused pid")
    _write_lock(tmp_path, **stale)
    with acquire(epath.Path(tmp_path)):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", '{"host": "a', "[1]", "null"])
def test_a_torn_lock_is_taken_over(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(text)
    acquire(epath.Path(tmp_path)).release()
    assert not (tmp_path / "run.lock").exists()


def test_another_host_that_still_beats_holds_it(tmp_path: Path) -> None:
    _write_lock(tmp_path, host="tpu-worker-7", pid=1, seen=time.time() - 0.9 * status.STALE_SECONDS)
    with pytest.raises(ConfigError, match="locked by host tpu-worker-7, pid 1.*if it is dead, delete '.*run.lock'"):
        acquire(epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("job", "now", "taken"),
    [
        ({"job": "BERTGPT_JOB=pod"}, {"BERTGPT_JOB": "pod"}, True),
        ({"job": "BERTGPT_JOB=pod"}, {"BERTGPT_JOB": "other"}, False),
        ({"job": "BERTGPT_JOB=pod"}, {}, False),
        ({"job": None}, {}, False),
        ({"job": "SKYPILOT_TASK_ID=sky-1"}, {"SKYPILOT_TASK_ID": "sky-1"}, True),
        ({"job": "SLURM_JOB_ID=7", "attempt": "0"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"job": "SLURM_JOB_ID=7", "attempt": "0"}, {"SLURM_JOB_ID": "7"}, False),
        ({"job": "BERTGPT_JOB=pod", "host": socket.gethostname()}, {"BERTGPT_JOB": "pod"}, False),
    ],
)
def test_a_job_started_again_elsewhere_takes_its_lock_over(
    job: dict[str, Any], now: dict[str, str], taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor starts the same job on another host while the old lock still looks fresh; nobody else may."""
    for name in ("BERTGPT_JOB", "SKYPILOT_TASK_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    _write_lock(tmp_path, **({"host": "node-of-before"} | job))
    if taken:
        acquire(epath.Path(tmp_path)).release()
    else:
        with pytest.raises(ConfigError, match="is locked by host"):
            acquire(epath.Path(tmp_path))


def test_of_two_that_start_at_once_the_later_write_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status.time, "sleep", lambda seconds: _write_lock(tmp_path, pid=4242))
    with pytest.raises(ConfigError, match="pid 4242"):
        acquire(epath.Path(tmp_path))


def test_release_leaves_a_lock_that_was_taken_over(tmp_path: Path) -> None:
    lock = acquire(epath.Path(tmp_path))
    _write_lock(tmp_path, host="another")
    lock.release()
    lock.release()
    assert json.loads((tmp_path / "run.lock").read_text())["host"] == "another"


def test_the_lock_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "BEAT_SECONDS", 0.02)
    with acquire(epath.Path(tmp_path)):
        first = json.loads((tmp_path / "run.lock").read_text())["seen"]
        deadline = time.monotonic() + 5
        seen = first
        while seen == first and time.monotonic() < deadline:
            time.sleep(0.02)
            seen = (status.storage.read_json(epath.Path(tmp_path) / "run.lock") or {"seen": first})["seen"]
    assert seen > first


def test_unwritable_workdir(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/run.lock"):
        acquire(epath.Path(tmp_path / "file"))


def test_status_round_trip_and_torn(tmp_path: Path) -> None:
    root = epath.Path(tmp_path)
    assert read_status(root) is None
    write_status(
        root, step=7, reason="finished", latest=6, best=3, state_fingerprint="ab", metrics={"eval/loss": 1.5, "x": None}
    )
    found = read_status(root)
    assert found is not None
    assert {k: found[k] for k in ("step", "reason", "latest", "best", "state_fingerprint", "metrics")} == {
        "step": 7,
        "reason": "finished",
        "latest": 6,
        "best": 3,
        "state_fingerprint": "ab",
        "metrics": {"eval/loss": 1.5, "x": None},
    }
    text = (tmp_path / "STATUS.json").read_text()
    for length in (0, 1, len(text) // 2):
        (tmp_path / "STATUS.json").write_text(text[:length])
        assert read_status(root) is None
    with pytest.raises(AssertionError):
        write_status(root, step=1, reason="bored")  # type: ignore[arg-type]
