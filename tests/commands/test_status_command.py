"""`tools/status.py`: one line a run, and an exit code that a watcher can use."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bertgpt_jax.commands import status


def write(workdir: Path, refreshed: float = 0.0, moved: float = 0.0, **changes: Any) -> str:
    """A STATUS.json that was refreshed and moved so many seconds ago."""
    now = time.time()
    progress = {
        "doing": "training", "total_steps": 2000, "moved": now - moved, "step_seconds": 0.5, "eta_seconds": 750.0,
        "checkpoint": 400, "checkpoint_time": now - 90, "checkpoint_age_seconds": 90.0, "refresh_seconds": 30.0,
    }  # fmt: skip
    progress |= changes.pop("progress", {})
    found = {
        "format_version": 1, "step": 500, "reason": "running", "latest": 400, "best": 400, "state_fingerprint": None,
        "metrics": {"train/loss": 3.25}, "message": "",
        "time": datetime.fromtimestamp(now - refreshed, UTC).isoformat(timespec="seconds"), "progress": progress,
    }  # fmt: skip
    found |= changes
    if found["reason"] not in ("running", "stalled"):
        del found["progress"]
    workdir.mkdir()
    (workdir / "STATUS.json").write_text(json.dumps(found))
    return str(workdir)


@pytest.mark.parametrize(
    ("case", "state", "code", "why"),
    [
        ({}, "running", 0, ""),
        ({"reason": "finished"}, "finished", 0, ""),
        ({"reason": "preempted"}, "preempted", 0, ""),
        ({"reason": "failed", "message": "another process failed"}, "failed", 76, "another process failed"),
        ({"reason": "diverged", "message": "5 updates in a row"}, "diverged", 77, "5 updates"),
        ({"reason": "stalled", "message": "nothing has moved for 30m"}, "stalled", 76, "nothing has moved"),
        ({"refreshed": 400}, "stalled", 76, "not refreshed for 6m"),
        ({"refreshed": 200}, "running", 0, ""),
        ({"moved": 2000}, "stalled", 76, "nothing has moved for 33m"),
        ({"moved": 2000, "progress": {"step_seconds": 300.0}}, "running", 0, ""),
        ({"moved": 2000, "progress": {"doing": "compiling"}}, "running", 0, ""),
        ({"moved": 2000, "progress": {"doing": "evaluating"}}, "stalled", 76, "evaluating"),
    ],
)
def test_states(case: dict, state: str, code: int, why: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    workdir = write(tmp_path / "run", **case)
    assert status.main([workdir, "--json"]) == code
    out, err = capsys.readouterr()
    (row,) = json.loads(out)
    assert row["state"] == state and why in row["why"] and bool(row["why"]) is (code != 0)
    assert (err == "") is (code == 0)


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good, dead = write(tmp_path / "good"), write(tmp_path / "dead", refreshed=7200)
    assert status.main([good, dead]) == 76
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == list(status.COLUMNS)
    assert "500/2,000" in first and "25%" in first and "12m30s" in first and "3.25" in first
    assert "400" in first and "1m30s ago" in first
    assert second.split()[1] == "stalled" and "2h00m ago" in second


def test_limits_can_be_chosen(tmp_path: Path) -> None:
    workdir = write(tmp_path / "run", refreshed=400, moved=400)
    assert status.main([workdir, "--silent-minutes", "10"]) == 0
    assert status.main([workdir, "--silent-minutes", "10", "--still-minutes", "5"]) == 76


@pytest.mark.parametrize("content", [None, "", '{"step": 1'])
def test_no_run(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if content is not None:
        (tmp_path / "STATUS.json").write_text(content)
    assert status.main([str(tmp_path)]) == 78
    assert "no STATUS.json that can be read" in capsys.readouterr().err
    assert status.main([str(tmp_path), write(tmp_path / "dead", refreshed=7200)]) == 76, "the more urgent one"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, "format_version is 2, this version reads 1"),
        ({"step": "500"}, "step is '500'"),
        ({"reason": "bored"}, "reason is 'bored'"),
        ({"time": "yesterday"}, "time is 'yesterday'"),
        ({"metrics": None}, "metrics is None"),
        ({"metrics": {"train/loss": "low"}}, "metrics.train/loss is 'low'"),
        ({"latest": [4]}, "latest is [4]"),
        ({"reason": "failed", "message": None}, "message is None"),
        ({"progress": {"moved": "now"}}, "progress.moved is 'now'"),
        ({"progress": {"total_steps": "many"}}, "progress.total_steps is 'many'"),
    ],
    ids=str,
)
def test_what_no_run_wrote(changes: dict, said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One line in the table and one of why; the others are shown."""
    strange, good = write(tmp_path / "strange", **changes), write(tmp_path / "good")
    assert status.main([strange, good]) == 78
    out, err = capsys.readouterr()
    _, first, second = out.splitlines()
    assert first.split() == [strange, "no", "run", *["-"] * (len(status.COLUMNS) - 2)]
    assert second.split()[1] == "running"
    assert err == f"{strange}: its STATUS.json is not what a run writes: {said}\n"


@pytest.mark.parametrize("left_out", ["step", "reason", "metrics", "message", "time", None])
def test_a_key_is_missing(left_out: str | None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Or all of them."""
    workdir = write(tmp_path / "run")
    file = tmp_path / "run" / "STATUS.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if left_out and key != left_out}
    file.write_text(json.dumps(kept))
    assert status.main([workdir]) == 78
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and err.endswith(f": {left_out or 'step'} is missing\n") and err.count("\n") == 1


@pytest.mark.parametrize("left_out", ["doing", "total_steps", "moved", "step_seconds", "checkpoint", "checkpoint_time"])
@pytest.mark.parametrize("null", [False, True])
def test_progress_that_says_less(left_out: str, null: bool, tmp_path: Path) -> None:
    workdir = write(tmp_path / "run")
    file = tmp_path / "run" / "STATUS.json"
    found = json.loads(file.read_text())
    found["progress"][left_out] = None
    if not null:
        del found["progress"][left_out]
    file.write_text(json.dumps(found))
    assert status.main([workdir]) == 0


def test_a_status_from_before_it_was_refreshed(tmp_path: Path) -> None:
    """An older run's file has no progress; what it says is shown."""
    workdir = write(tmp_path / "run", reason="finished", step=20, latest=20)
    assert status.main([workdir]) == 0
