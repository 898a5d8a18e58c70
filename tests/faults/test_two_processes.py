"""The whole command in two processes of four devices over loopback."""

from __future__ import annotations

import signal
from typing import Any

import pytest

Run = Any  # conftest.Run
pytestmark = pytest.mark.timeout(600)


@pytest.mark.slow
def test_same_losses_and_batches_as_one_process(undisturbed: Run, disturbed: Run) -> None:
    ends = disturbed.pair({})
    assert [end.code for end in ends] == [0, 0], ends
    # threads of gloo write their lines in pieces, which may mix
    said = [line for line in ends[1].out.splitlines() if "[Gloo]" not in line and "peer ranks" not in line]
    assert [line for line in said if line.strip()] == [], "the first process alone talks"
    assert disturbed.batches() == undisturbed.batches()
    for ours, theirs in zip(disturbed.rows(), undisturbed.rows(), strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for key in ("train/loss", "eval/loss", "optim/grad_norm"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], abs=1e-5, rel=0), (ours["step"], key)
    assert not (disturbed.workdir / "run.lock").exists()


@pytest.mark.slow
def test_one_is_asked_to_stop(undisturbed: Run, disturbed: Run) -> None:
    """Both save the same step; one process goes on from what two saved."""
    ends = disturbed.pair({"signal": ["SIGTERM", 6]})
    assert [end.code for end in ends] == [75, 75], ends
    status = disturbed.status()
    assert status["reason"] == "preempted" and status["latest"] == status["step"]
    assert 6 <= status["step"] < 20
    assert f"asked to stop at step {status['step']}" in ends[0].err
    end = disturbed.train()
    assert end.code == 0, end
    assert f"resumed at step {status['step']}" in end.out
    assert disturbed.batches() == undisturbed.batches()
    for ours, theirs in zip(disturbed.rows(), undisturbed.rows(), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5, rel=0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param("seed=1", marks=pytest.mark.slow),
        pytest.param("execution.log_every=3", marks=pytest.mark.long),
        pytest.param("stages.short.batch_size=16", marks=pytest.mark.long),
    ],
)
def test_they_disagree(change: str, disturbed: Run) -> None:
    """Both end at once, and both say who and what."""
    ends = disturbed.pair({}, second=(change,))
    key, value = change.split("=")
    key = key.replace("stages.short", "stages.0")
    assert [end.code for end in ends] == [78, 78], ends
    for end in ends:
        assert f"process 1 has {key} = {value}" in end.err and "Traceback" not in end.err, end
    assert max(end.seconds for end in ends) < 60, "nothing was compiled"
    assert not disturbed.workdir.exists()


@pytest.mark.slow
def test_one_fails_alone(disturbed: Run) -> None:
    """It says why and leaves; the other does not wait for it, though it can only abort."""
    ends = disturbed.pair({"bad_batch": 7}, "execution.distributed.heartbeat_timeout=10")
    assert ends[1].code == 65, ends
    assert "batch 7 cannot be read" in ends[1].err
    assert ends[0].code in (76, -signal.SIGABRT), ends
    assert ends[0].seconds - ends[1].seconds < 30, "10 s until its heartbeats are missed"
