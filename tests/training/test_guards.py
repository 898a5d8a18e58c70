"""SIGTERM and SIGINT end a run after a save; a second one ends it at once; foreign handlers still get their turn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from bertgpt_jax.training.guards import PreemptionGuard


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "preempted"), (signal.SIGINT, "interrupted")])
def test_a_signal_stops_at_the_next_question(number: int, reason: str) -> None:
    before = signal.getsignal(number)
    with PreemptionGuard() as guard:
        assert not guard.should_stop(1) and guard.reason is None
        os.kill(os.getpid(), number)
        assert guard.should_stop(2) and guard.should_stop(3)
        assert guard.reason == reason
    assert signal.getsignal(number) is before


def test_a_foreign_handler_is_called_too_and_comes_back() -> None:
    got: list[int] = []

    def foreign(number: int, frame: Any) -> None:
        got.append(number)

    before = signal.signal(signal.SIGTERM, foreign)
    try:
        with PreemptionGuard() as guard:
            os.kill(os.getpid(), signal.SIGTERM)
            assert guard.should_stop(1)
        assert got == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is foreign
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_it_guards_nothing_and_breaks_nothing() -> None:
    answers: list[bool] = []

    def run() -> None:
        with PreemptionGuard() as guard:
            answers.append(guard.should_stop(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [False]


_CHILD = """
import time
from bertgpt_jax.training import guards
guards.FORCE_SECONDS = 100  # a busy machine may let more than 5 s pass between two lines of the test
with guards.PreemptionGuard() as guard:
    print("up", flush=True)
    while not guard.should_stop(0):
        time.sleep(0.01)
    print("stopping", guard.reason, flush=True)
    time.sleep(90)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_the_process_at_once(number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", _CHILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == b"up\n"
        child.send_signal(number)
        assert child.stdout.readline().startswith(b"stopping")
        child.send_signal(number)
        assert child.wait(timeout=60) == 128 + number
        assert b"second signal" in child.stderr.read()
