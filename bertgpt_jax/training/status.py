"""What the outside sees of a run: `run.lock` (somebody trains here) and `STATUS.json` (how it stands or ended)."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from etils import epath

from bertgpt_jax.errors import ConfigError, StorageError
from bertgpt_jax.training import processes, storage

Reason = Literal["running", "finished", "preempted", "interrupted", "diverged", "failed", "stalled"]

BEAT_SECONDS = 60.0
"""How often a lock is renewed."""

STALE_SECONDS = 600.0
"""A lock of another host that was not renewed for so long belongs to a dead run."""


# ---------------------------------------------------------------- STATUS.json


def write_status(
    workdir: epath.Path,
    *,
    step: int,
    reason: Reason,
    latest: int | None = None,
    best: int | None = None,
    state_fingerprint: str | None = None,
    metrics: dict[str, Any] | None = None,
    message: str = "",
    progress: dict[str, Any] | None = None,
) -> None:
    """Writes `STATUS.json`, from the first process.

    Args:
        workdir: where.
        step: the step the run is at.
        reason: `running` from the start, then how it ended.
        latest: newest committed checkpoint.
        best: the one with the best metric of the current stage.
        state_fingerprint: of the state at `step` (`fingerprint.state_fingerprint`).
        metrics: last value of each.
        message: one line for people (why it failed).
        progress: of a run that goes on (`watch.Watch.progress`).

    Raises:
        StorageError: if it cannot be written.
    """
    assert reason in get_args(Reason), reason
    if not processes.is_primary():
        return
    status = {
        "format_version": 1,
        "step": step,
        "reason": reason,
        "latest": latest,
        "best": best,
        "state_fingerprint": state_fingerprint,
        "metrics": metrics or {},
        "message": message,
        "time": _now(),
    }
    storage.write_json(workdir / "STATUS.json", status | ({"progress": progress} if progress else {}))


def read_status(workdir: epath.Path) -> dict[str, Any] | None:
    """`STATUS.json` as a dict; None if it is missing or torn."""
    status = storage.read_json(workdir / "STATUS.json")
    return status if isinstance(status, dict) else None


_KINDS: dict[str, type | tuple[type, ...]] = {
    "step": int, "reason": str, "metrics": dict, "message": str, "time": str, "latest": (int, type(None)),
    "progress": (dict, type(None)),
}  # fmt: skip
_PROGRESS = ("total_steps", "moved", "step_seconds", "eta_seconds", "checkpoint", "checkpoint_time")


def status_problem(status: dict[str, Any]) -> str:
    """Why a `STATUS.json` is none that `write_status` wrote, for a message; empty if it can be shown.

    Numbers of `progress` may be absent or null: older runs wrote fewer.
    """
    version = status.get("format_version", 1)
    if version != 1:
        return f"format_version is {version!r}, this version reads 1"
    for key, kind in _KINDS.items():
        if not isinstance(status.get(key), kind):
            return f"{key} is {status[key]!r}" if key in status else f"{key} is missing"
    if status["reason"] not in get_args(Reason):
        return f"reason is {status['reason']!r}"
    try:
        datetime.fromisoformat(status["time"])
    except ValueError:
        return f"time is {status['time']!r}"
    progress = status.get("progress") or {}
    numbers = {f"progress.{key}": progress.get(key) for key in _PROGRESS}
    numbers["metrics.train/loss"] = status["metrics"].get("train/loss")
    wrong = {key: value for key, value in numbers.items() if not isinstance(value, int | float | None)}
    return next((f"{key} is {value!r}" for key, value in wrong.items()), "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---------------------------------------------------------------- run.lock


class RunLock:
    """A workdir held by this run until `release`; made by `acquire`. A thread renews it: others look at its age."""

    def __init__(self, path: epath.Path, entry: dict[str, Any] | None):
        self._path, self._entry = path, entry
        self._stop = threading.Event()
        if entry is not None:
            self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        assert self._entry is not None
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(StorageError):
                storage.write_json(self._path, {**self._entry, "seen": time.time()})

    def release(self) -> None:
        """Removes the lock, if it is still ours; the second call does nothing."""
        if self._entry is None:
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(StorageError):
            if _token(storage.read_json(self._path)) == self._entry["token"]:
                storage.delete(self._path)
        self._entry = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()


def acquire(workdir: epath.Path) -> RunLock:
    """Takes the workdir for this run; with several processes, all of them call this and the first holds the lock.

    A lock whose process is dead (same host) or that was not renewed for 10 minutes (another host) is taken over; so is
    one of the same job (`job_name`) on another host: its supervisor has started it again there.

    Raises:
        ConfigError: another run holds it: its host, process id and start.
        StorageError: the workdir cannot be written.
    """
    return RunLock(workdir / "run.lock", _or_none(processes.on_primary(_acquire, workdir)))


def _or_none(entry: dict[str, Any]) -> dict[str, Any] | None:
    return entry if processes.is_primary() else None


def _acquire(workdir: epath.Path) -> dict[str, Any]:
    path = workdir / "run.lock"
    holder = storage.read_json(path)
    if isinstance(holder, dict) and _is_alive(holder):
        raise _locked(workdir, holder)
    entry = {
        "job": job_name(),
        "attempt": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "since": _now(),
        "seen": time.time(),
        "token": secrets.token_hex(8),
    }
    storage.write_json(path, entry)
    # No storage here can create exclusively: of two that start at once, the later write wins and the other finds out.
    time.sleep(0.1 if storage.is_local(workdir) else 2.0)
    now = storage.read_json(path)
    if _token(now) != entry["token"]:
        raise _locked(workdir, now if isinstance(now, dict) else {})
    return entry


def job_name(environ: Mapping[str, str] = os.environ) -> str | None:
    """What a supervisor calls the job, the same each time it starts it again; None if there is none that says so.

    BERTGPT_JOB, else the number of a SLURM job (requeued under the same) or the id of a SkyPilot managed job.
    """
    for name in ("BERTGPT_JOB", "SKYPILOT_TASK_ID", "SLURM_JOB_ID"):
        if environ.get(name):
            return f"{name}={environ[name]}"
    return None


def _was_restarted(holder: dict[str, Any]) -> bool:
    """Whether a lock is of an earlier start of this very job (of a SLURM job, before it was requeued)."""
    job = job_name()
    same = job is not None and holder.get("job") == job
    requeued = holder.get("attempt") != os.environ.get("SLURM_RESTART_COUNT", "0")
    return same and (requeued or not job.startswith("SLURM_JOB_ID="))


def _token(entry: Any) -> Any:
    return entry.get("token") if isinstance(entry, dict) else None


def _locked(workdir: epath.Path, holder: dict[str, Any]) -> ConfigError:
    host, pid, since = (holder.get(key, "?") for key in ("host", "pid", "since"))
    remedy = f"wait for it, stop it, or use another workdir; if it is dead, delete '{workdir / 'run.lock'}'"
    return ConfigError(f"workdir '{workdir}' is locked by host {host}, pid {pid}, since {since}: {remedy}")


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the run that wrote a lock may still be there."""
    pid, seen = holder.get("pid"), holder.get("seen")
    if not isinstance(pid, int) or not isinstance(seen, int | float):
        return False  # not a lock of ours
    if holder.get("host") != socket.gethostname():
        return abs(time.time() - seen) < STALE_SECONDS and not _was_restarted(holder)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's process: it is there
    # in a restarted container the same pid is another process
    return _process_start(pid) == holder.get("process_start")


def _process_start(pid: int) -> int | None:
    """Start of a process in clock ticks since boot, which with the pid names it; None where /proc is missing."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])
