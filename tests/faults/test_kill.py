"""A run that was killed or asked to stop, and started again, ends with the same bits as one that was left alone."""

from __future__ import annotations

import signal
from typing import Any

import pytest

Run = Any  # conftest.Run
pytestmark = pytest.mark.timeout(600)


def rows_by_step(run: Run) -> list[int]:
    return [row["step"] for row in run.rows()]


def test_the_undisturbed_run(undisturbed: Run) -> None:
    """What the other tests compare with says something: rows, evaluations and batches are all there."""
    status = undisturbed.status()
    assert (status["step"], status["reason"], status["latest"]) == (20, "finished", 20)
    assert len(status["state_fingerprint"]) == 32
    assert rows_by_step(undisturbed) == [2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20]
    assert [row["step"] for row in undisturbed.rows() if "eval/loss" in row] == [5, 10, 12, 15, 20]
    batches = undisturbed.batches()
    assert len(batches) == 20 * 8 and len(set(batches.values())) == len(batches)
    assert not (undisturbed.workdir / "run.lock").exists()


def test_killed_three_times(undisturbed: Run, disturbed: Run) -> None:
    """Before the first checkpoint, between two, and in the second stage."""
    for step, resumed in ((3, None), (7, None), (14, 4)):
        end = disturbed.train(signal=["SIGKILL", step], settled=True)
        assert end.code == -signal.SIGKILL, end
        assert (f"resumed at step {resumed}" if resumed else "fresh start") in end.out
        assert disturbed.status()["reason"] == "running"
    end = disturbed.train()
    assert end.code == 0, end
    assert "resumed at step 12" in end.out
    assert disturbed.result() == undisturbed.result()


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(n, marks=pytest.mark.slow if n in (5, 12) else pytest.mark.long)
        for n in (1, 4, 5, 6, 11, 12, 13, 20)
    ],
)
def test_killed_around_every_kind_of_step(step: int, undisturbed: Run, disturbed: Run) -> None:
    """Also while checkpoints are being written: the steps take less time than a save."""
    assert disturbed.train(signal=["SIGKILL", step]).code == -signal.SIGKILL
    end = disturbed.train()
    assert end.code == 0, end
    assert disturbed.result() == undisturbed.result()


@pytest.mark.long
@pytest.mark.parametrize("step", [5, 12, 20])
def test_killed_in_an_evaluation(step: int, undisturbed: Run, disturbed: Run) -> None:
    assert disturbed.train(evaluation=["SIGKILL", step]).code == -signal.SIGKILL
    end = disturbed.train()
    assert end.code == 0, end
    assert disturbed.result() == undisturbed.result()


STOPS = [
    {"signal": ["SIGTERM", 3]},  # no row, no evaluation
    {"evaluation": ["SIGTERM", 5]},
    {"signal": ["SIGTERM", 6]},  # a row
    {"signal": ["SIGINT", 10]},  # an evaluation is due
    {"signal": ["SIGTERM", 12]},  # the stage's last evaluation is due
    {"evaluation": ["SIGTERM", 12]},
    {"signal": ["SIGTERM", 13]},
    {"evaluation": ["SIGTERM", 20]},
]


@pytest.mark.long
def test_asked_to_stop_again_and_again(undisturbed: Run, disturbed: Run) -> None:
    """One run, stopped at eight moments, some of them twice; then once more after its end."""
    for faults in STOPS:
        (name, step), *_ = faults.values()
        end = disturbed.train(**faults)
        assert end.code == 75, end
        assert f"asked to stop at step {step}" in end.err and "Traceback" not in end.err
        status = disturbed.status()
        reason = "interrupted" if name == "SIGINT" else "preempted"
        assert (status["step"], status["latest"], status["reason"]) == (step, step, reason)
    assert disturbed.train().code == 0
    assert disturbed.result() == undisturbed.result()

    before = disturbed.status()
    end = disturbed.train()
    assert end.code == 0 and "nothing to do" in end.out
    after = disturbed.status()
    assert {**before, "time": 0} == {**after, "time": 0}
    assert disturbed.result() == undisturbed.result()


@pytest.mark.slow
def test_a_row_that_is_owed_survives_a_kill(undisturbed: Run, disturbed: Run) -> None:
    """Stopped in an evaluation, killed in it again, then killed after it was written and before the next save."""
    assert disturbed.train(evaluation=["SIGTERM", 10]).code == 75
    assert disturbed.train(evaluation=["SIGKILL", 10]).code == -signal.SIGKILL
    assert disturbed.train(signal=["SIGKILL", 11]).code == -signal.SIGKILL
    assert disturbed.train().code == 0
    assert disturbed.result() == undisturbed.result()


@pytest.mark.slow
def test_stopped_at_the_stage_boundary(undisturbed: Run, disturbed: Run) -> None:
    """In the last evaluation of the first stage, which the resumed run must do with the first stage's data."""
    end = disturbed.train(evaluation=["SIGTERM", 12])
    assert end.code == 75, end
    assert disturbed.status()["latest"] == 12 and rows_by_step(disturbed)[-1] == 10
    assert disturbed.train().code == 0
    assert disturbed.result() == undisturbed.result()
