"""Beside a run: STATUS.json tells where it is, and a hang ends it with stacks and exit code 76."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from bertgpt_jax.training import checkpoint_files, storage, watch
from bertgpt_jax.training.watch import Watch


class Reports(list):
    """What a watch reported, and with which code it would have left."""

    code: int | None = None

    def add(self, progress: dict[str, Any], message: str) -> None:
        self.append((progress, message))

    def leave(self, code: int) -> None:
        self.code = code


def make(tmp_path: Path, minutes: float | None, step: int = 0) -> tuple[Watch, Reports]:
    reports = Reports()
    return Watch(epath.Path(tmp_path), step, 100, minutes, reports.add, reports.leave), reports


def wait_for(condition: Any, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    found, _ = make(tmp_path, None, step=10)
    now[0] += 50  # compiling counts for no step
    found.moved(10)
    for step in (11, 12, 13, 14):
        now[0] += 2
        found.moved(step)
    progress = found.progress()
    assert (progress["step_seconds"], progress["eta_seconds"], progress["total_steps"]) == (2.0, 172.0, 100)
    assert progress["checkpoint"] is progress["checkpoint_age_seconds"] is None
    step = checkpoint_files.step_directory(epath.Path(tmp_path), 12) / "state"
    storage.write_text(step / checkpoint_files.COMMIT_MARKER, "")
    progress = found.progress()
    assert progress["checkpoint"] == 12 and 0 <= progress["checkpoint_age_seconds"] < 60


def test_it_refreshes_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "REFRESH_SECONDS", 0.05)
    found, reports = make(tmp_path, None)
    with found:
        assert reports[0][0]["doing"] == "starting", "said at once"
        found.moved(3, "evaluating")
        assert wait_for(lambda: reports[-1][0]["doing"] == "evaluating")
    count = len(reports)
    time.sleep(0.2)
    assert len(reports) == count and all(message == "" for _, message in reports)


def test_a_hang_ends_the_process(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found, reports = make(tmp_path, 0.005)
    with found:
        found.moved(7)
        assert wait_for(lambda: reports.code is not None)
    assert reports.code == 76
    progress, message = reports[-1]
    assert "nothing has moved for" in message and "at step 7 (training)" in message and progress["doing"] == "training"
    stacks = (tmp_path / "stacks" / "process-0-step-7.txt").read_text()
    assert "test_a_hang_ends_the_process" in stacks and "Thread 0x" in stacks
    err = capsys.readouterr().err
    assert stacks in err and err.rstrip().splitlines()[-1] == f"error: {message}"


@pytest.mark.parametrize("what", ["moving", "compiling", "never"])
def test_what_is_no_hang(what: str, tmp_path: Path) -> None:
    found, reports = make(tmp_path, None if what == "never" else 0.005)
    with found:
        found.moved(1)
        if what == "compiling":
            found.doing("compiling")
        for step in range(6):
            time.sleep(0.1)
            if what == "moving":
                found.moved(step)
    assert reports.code is None


def test_a_run_of_slow_steps_is_given_more_time(tmp_path: Path) -> None:
    """What took 0.2 s once is a hang only after five times as long, though the limit is 0.1 s."""
    found, reports = make(tmp_path, None)
    found.moved(1)
    time.sleep(0.2)
    found.moved(2)
    found._limit = 0.1
    begun = time.monotonic()
    with found:
        assert wait_for(lambda: reports.code is not None)
    assert time.monotonic() - begun > 0.9


def test_storage_that_hangs_does_not_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LAST_WORDS_SECONDS", 0.2)
    monkeypatch.setattr(storage, "write_text", lambda *_: time.sleep(1.5))
    found, reports = make(tmp_path, 0.005)
    with found:
        found.moved(7)
        assert wait_for(lambda: reports.code == 76, 1.4)
