"""Two threads beside a run: one refreshes STATUS.json, one ends the process when nothing moves any more.

A peer that hangs without dying (a device, a disk, a loop in user code) blocks all others for ever: no heartbeat of jax
is missed. The only sign is that no step ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from bertgpt_jax.errors import PeerError, StorageError
from bertgpt_jax.training import checkpoint_files, processes, storage
from bertgpt_jax.training.metrics import duration

REFRESH_SECONDS = 30.0
"""How often STATUS.json is written while a run goes on."""

SLACK = 5.0
"""What has taken so long once may take so many times as long before it counts as a hang."""

LAST_WORDS_SECONDS = 60.0
"""How long a hung process may take to say so: the storage may be what hangs."""


class Watch:
    """Knows when a run last moved; stops with the `with` block.

    Args:
        workdir: where stacks are written, in `stacks/`.
        step, total_steps: where the run begins, and its last step.
        stall_minutes: without any move, after which the process ends with exit code 76; None: never.
        report: writes STATUS.json: (progress, message), the message empty while all is well. Called in the first
            process only, from threads of this object.
        leave: ends the process.
    """

    def __init__(
        self,
        workdir: epath.Path,
        step: int,
        total_steps: int,
        stall_minutes: float | None,
        report: Callable[[dict[str, Any], str], None],
        leave: Callable[[int], None] = os._exit,
    ):
        self._workdir, self._total, self._report, self._leave = workdir, total_steps, report, leave
        self._limit = 60 * stall_minutes if stall_minutes else None
        self._begin = self._step = step
        self._doing, self._armed = "starting", False
        self._moved, self._longest = time.monotonic(), 0.0
        self._since = self._moved
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._guard, name="watch", daemon=True)]
        if processes.is_primary():
            self._threads.append(threading.Thread(target=self._refresh, name="status", daemon=True))

    def __enter__(self) -> Watch:
        if processes.is_primary():
            self._report(self.progress(), "")
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    # ------------------------------------------------------------ called by the run

    def doing(self, what: str) -> None:
        """What the run is at, where no step is expected to end (starting, compiling, finishing)."""
        self._doing, self._armed = what, False

    def moved(self, step: int, what: str = "training") -> None:
        """The run has come to `step`, or has finished a part of `what` it does there; cheap."""
        now = time.monotonic()
        if self._armed:
            self._longest = max(self._longest, now - self._moved)
        elif self._step == self._begin:
            self._since = now  # steps are counted from here: compiling is over
        self._doing, self._step, self._moved, self._armed = what, step, now, True

    # ------------------------------------------------------------ the threads

    def progress(self) -> dict[str, Any]:
        """What STATUS.json says of a run that goes on; times in seconds since 1970."""
        now, done = time.time(), self._step - self._begin
        per_step = (self._moved - self._since) / done if done else None
        saved, saved_at = self._newest_checkpoint()
        return {
            "doing": self._doing,
            "total_steps": self._total,
            "moved": now - (time.monotonic() - self._moved),
            "step_seconds": per_step,
            "eta_seconds": per_step and per_step * (self._total - self._step),
            "checkpoint": saved,
            "checkpoint_time": saved_at,
            "checkpoint_age_seconds": saved_at and now - saved_at,
            "refresh_seconds": REFRESH_SECONDS,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def _newest_checkpoint(self) -> tuple[int | None, float | None]:
        with contextlib.suppress(OSError, StorageError, ValueError):
            steps = checkpoint_files.list_steps(self._workdir)
            if steps:
                marker = checkpoint_files.step_directory(self._workdir, steps[-1]) / "state"
                return steps[-1], float((marker / checkpoint_files.COMMIT_MARKER).stat().mtime)
        return None, None

    @property
    def step(self) -> int:
        """The step the run has come to."""
        return self._step

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            with contextlib.suppress(StorageError, OSError, RuntimeError):  # the next one may succeed
                self._report(self.progress(), "")

    def _guard(self) -> None:
        if self._limit is None:
            return
        while not self._stop.wait(min(10.0, self._limit / 4)):
            still = time.monotonic() - self._moved
            if self._armed and still > max(self._limit, SLACK * self._longest):
                self._give_up(still)
                return

    def _give_up(self, still: float) -> None:
        """Prints all stacks and leaves; nothing here may wait for what hangs."""
        code = PeerError.exit_code
        self._stop.set()  # nothing is to say after this that the run goes on
        last = threading.Timer(LAST_WORDS_SECONDS, self._leave, [code])
        last.daemon = True
        last.start()
        name = f"process-{jax.process_index()}-step-{self._step}.txt"
        message = (
            f"nothing has moved for {duration(still)} at step {self._step:,} ({self._doing}): this process or another "
            f"one hangs; stacks of all threads are above and in '{self._workdir / 'stacks' / name}'; start again"
        )
        with contextlib.suppress(Exception):  # whatever goes wrong here must not keep the process
            with tempfile.TemporaryFile("w+") as file:
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                stacks = file.read()
            sys.stderr.write(f"{stacks}\nerror: {message}\n")
            sys.stderr.flush()
            storage.write_text(self._workdir / "stacks" / name, stacks)
            if processes.is_primary():
                self._report(self.progress(), message)
        last.cancel()
        self._leave(code)
