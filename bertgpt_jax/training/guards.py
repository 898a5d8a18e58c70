"""Stopping on request: SIGTERM (the scheduler wants the machine back) and SIGINT (Ctrl-C) end a run after a save."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from bertgpt_jax.training import processes

log = logging.getLogger(__name__)

FORCE_SECONDS = 5.0
"""A second signal within so many seconds of the first ends the process at once."""


class PreemptionGuard:
    """Says when to stop; to be asked wherever the run may spend long (training, evaluation, warm-up).

    One process: its own handlers. Several: JAX's preemption service makes all of them agree on one step, and must own
    SIGTERM (a Python handler silently disables it); SIGINT is passed on as SIGTERM. Where a foreign SIGTERM handler is
    found in any process, all of them fall back to asking each other every step, and the foreign handler is called too.

        with PreemptionGuard() as guard:
            while step < steps and not guard.should_stop(step): ...
        # guard.reason is "preempted" or "interrupted" if it stopped
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._signal: int | None = None
        self._first = -FORCE_SECONDS
        self._stopped = False
        self._mode = "own"

    def __enter__(self) -> PreemptionGuard:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python allows handlers in the main thread only; then only the other processes can stop us
        if jax.process_count() > 1:
            plain = signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, None)
            self._mode = "service" if processes.all_agree(plain) else "ask"
            if self._mode == "ask":
                log.warning("a foreign SIGTERM handler is installed: the processes ask each other at every step")
        for number in (signal.SIGINT,) if self._mode == "service" else (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._first < FORCE_SECONDS:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"second signal: leaving without a save\n")
            os._exit(128 + number)
        self._first, self._signal = now, number
        os.write(2, b"asked to stop: will save and leave after this step (again within 5 s: at once)\n")
        if self._mode == "service":
            os.kill(os.getpid(), signal.SIGTERM)
        previous = self._previous.get(number)
        if number == signal.SIGTERM and callable(previous):
            previous(number, frame)

    @property
    def reason(self) -> str | None:
        """`interrupted` if this process got SIGINT, else `preempted`; None if nobody asked to stop."""
        if not self._stopped and self._signal is None:
            return None
        return "interrupted" if self._signal == signal.SIGINT else "preempted"

    def should_stop(self, step: int) -> bool:
        """Whether to save and leave now. With several processes, all ask, at the same steps, and get one answer."""
        if self._mode == "service":
            self._stopped = self._stopped or bool(multihost_utils.reached_preemption_sync_point(step))
        elif self._mode == "ask":
            self._stopped = self._stopped or not processes.all_agree(self._signal is None)
        else:
            self._stopped = self._signal is not None
        return self._stopped
