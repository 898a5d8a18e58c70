"""Rows survive any kill and come out byte for byte; the console line reads well; trouble never stops a run."""

from __future__ import annotations

import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bertgpt_jax.errors import StorageError
from bertgpt_jax.training import metrics, rows, storage
from bertgpt_jax.training.metrics import MetricWriter, console_line, duration, short_number
from bertgpt_jax.training.rows import read_rows, to_number

# ---------------------------------------------------------------- a run, killed and resumed


class _Killed(Exception):
    """Stands for SIGKILL: nothing after it happens."""


SAVE, EVAL, LOG = 10, 15, 2


def _train(workdir: Path, stop: int, restored: int | None, flush_seconds: float = 0.0) -> None:
    """The loop's order (evaluate, save, step, log) with numbers that depend on the step alone."""
    writer = MetricWriter(epath.Path(workdir), restored_step=restored, tensorboard=False, flush_seconds=flush_seconds)
    start = restored or 0
    for step in range(start, stop + 1):
        fresh = step > start or restored is None
        if fresh and (step % EVAL == 0 or step == stop):
            writer.log(step, {"eval/loss": np.float32(9.0 / (1 + step))})
            writer.join()
        if fresh and (step % SAVE == 0 or step == stop):
            writer.join()
            storage.write_text(epath.Path(workdir) / f"checkpoint-{step:04d}", "")
        if step < stop and (step + 1) % LOG == 0:
            values = {"train/loss": np.float32(1.0) / np.float32(step + 3), "train/count": step}
            writer.log(step + 1, values, {"throughput/tokens_per_sec": 1e5})
    writer.close()


def _latest(workdir: Path) -> int | None:
    return max((int(p.name[-4:]) for p in workdir.glob("checkpoint-*")), default=None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "SEGMENT_ROWS", 7)
        _train(workdir, 60, None)
    return (workdir / "metrics.jsonl").read_bytes()


def _kill_at_write(patch: pytest.MonkeyPatch, number: int, kept: float) -> None:
    """The `number`-th write from now on is cut to a fraction of its bytes, and the run is dead."""
    count = iter(range(1, 10**9))

    def write(path: epath.Path, data: bytes) -> None:
        if next(count) >= number:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data[: int(len(data) * kept)])
            raise _Killed
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    patch.setattr(storage, "write_bytes", write)
    # a kill is not an error that the writer may survive
    patch.setattr(MetricWriter, "_warning", lambda self, what: io.StringIO())


_WRITES = st.one_of(st.integers(1, 6), st.integers(7, 60))
_KILLS = st.lists(st.tuples(_WRITES, st.sampled_from([0.0, 0.4, 0.99, 1.0])), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@example(kills=[(60, 1.0), (3, 0.0), (1, 0.4), (2, 0.0)], flush_seconds=0.0)
@given(kills=_KILLS, flush_seconds=st.sampled_from([0.0, 1e9]))
def test_killed_in_any_write_and_resumed_gives_the_same_bytes(
    kills: list[tuple[int, float]],
    flush_seconds: float,
    undisturbed: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    workdir = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "SEGMENT_ROWS", 7)
        for number, kept in kills:
            with pytest.MonkeyPatch.context() as deadly:
                _kill_at_write(deadly, number, kept)
                try:
                    _train(workdir, 60, _latest(workdir), flush_seconds)
                except _Killed:
                    continue
        _train(workdir, 60, _latest(workdir))
        assert (workdir / "metrics.jsonl").read_bytes() == undisturbed
        assert [json.dumps(row) + "\n" for row in read_rows(epath.Path(workdir))] == undisturbed.decode().splitlines(
            True
        )
    shutil.rmtree(workdir)


def test_rows_not_joined_yet_are_read(tmp_path: Path) -> None:
    writer = MetricWriter(epath.Path(tmp_path), tensorboard=False, flush_seconds=0)
    for step in range(1, 4):
        writer.log(step, {"train/loss": 0.5 * step})
    assert (tmp_path / "metrics.jsonl").exists() is False
    assert read_rows(epath.Path(tmp_path)) == [{"step": s, "train/loss": 0.5 * s} for s in (1, 2, 3)]
    (tmp_path / "metrics" / "000000000.jsonl").write_text('{"step": 1, "a": 2}\n{"step": 2, "a"')
    assert read_rows(epath.Path(tmp_path)) == [{"step": 1, "a": 2}]
    assert read_rows(epath.Path(tmp_path / "nothing")) == []


def test_a_fresh_start_drops_rows_and_segments_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SEGMENT_ROWS", 3)
    _train(tmp_path, 30, None)
    assert len(list((tmp_path / "metrics").iterdir())) > 3
    writer = MetricWriter(epath.Path(tmp_path), restored_step=None, tensorboard=False)
    writer.close()
    assert read_rows(epath.Path(tmp_path)) == [] and writer.last == {}
    assert list((tmp_path / "metrics").iterdir()) == []


def test_last_values_are_known_also_after_a_resume(tmp_path: Path) -> None:
    _train(tmp_path, 30, None)
    writer = MetricWriter(epath.Path(tmp_path), restored_step=20, tensorboard=False)
    assert writer.last == {"eval/loss": to_number(np.float32(9.0 / 16)), "train/loss": 0.045454547, "train/count": 19}
    writer.log(22, {"train/loss": 7.0})
    assert writer.last["train/loss"] == 7.0 and writer.last["train/count"] == 19


def test_clocks_stay_out_of_metrics(tmp_path: Path) -> None:
    _train(tmp_path, 10, None)
    keys = {key for row in read_rows(epath.Path(tmp_path)) for key in row}
    assert keys == {"step", "eval/loss", "train/loss", "train/count"}
    assert {key for row in read_rows(epath.Path(tmp_path), "timing") for key in row} == {
        "step",
        "throughput/tokens_per_sec",
    }


# ---------------------------------------------------------------- numbers


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_float32_is_written_short_and_read_back_exactly(x: float) -> None:
    written = json.dumps(to_number(np.float32(x)))
    assert np.float32(json.loads(written)) == np.float32(x)
    assert len(written) <= 24


def test_numbers() -> None:
    assert to_number(jnp.float32(3.214)) == 3.214
    assert to_number(jnp.bfloat16(0.5)) == 0.5
    assert to_number(0.1) == 0.1 and to_number(np.float64(0.1)) == 0.1
    assert to_number(jnp.int32(7)) == 7 and isinstance(to_number(np.int64(7)), int)
    assert to_number(True) == 1
    assert to_number(float("nan")) is None and to_number(jnp.float32(jnp.inf)) is None


# ---------------------------------------------------------------- the console


def test_console_line() -> None:
    fields = {"loss": 3.2143, "mlm": 2.9, "lr": 1e-4, "tok/s": 12345.6, "data": 0.02, "mfu": 0.412, "eta": 190}
    assert console_line(120, 2000, fields) == (
        "step 120/2,000 | loss 3.214 | mlm 2.9 | lr 1.0e-4 | 12.3k tok/s | data 2% | mfu 41% | eta 3m10s"
    )
    odd = {
        "loss": float("nan"),
        "lr": 0.0,
        "data": 0.0,
        "mfu": 0.00031,
        "eta": float("inf"),
        "stage": "phase1",
        "x": None,
    }
    assert console_line(7, None, odd) == (
        "step 7 | loss nan | lr 0 | data 0% | mfu 0.031% | eta ? | stage phase1 | x -"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (60, "1m00s"), (190, "3m10s"), (3600, "1h00m"), (18240, "5h04m"), (183600, "2d03h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3.21449, "3.214"), (0.00012346, "0.0001235"), (999.9, "999.9"), (12345, "12.3k"), (-2.5e6, "-2.5M")],
)
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text


def test_lines_go_to_stdout_and_the_bar_only_to_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = MetricWriter(epath.Path(tmp_path), total_steps=10, tensorboard=False)
    writer.tick(1)
    writer.print(1, {"loss": 2.0})
    writer.close()
    captured = capsys.readouterr()
    assert captured.out == "step 1/10 | loss 2\n" and captured.err == ""

    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(metrics.sys, "stderr", terminal)
    writer = MetricWriter(epath.Path(tmp_path), restored_step=4, total_steps=10, tensorboard=False)
    writer.tick(5)
    writer.print(5, {"loss": 2.0})
    writer.close()
    assert "step 5/10 | loss 2\n" in capsys.readouterr().out
    assert "/10" in terminal.getvalue()


# ---------------------------------------------------------------- trouble


def test_a_full_disk_is_one_warning_and_the_rows_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = MetricWriter(epath.Path(tmp_path), tensorboard=False, flush_seconds=0)
    with monkeypatch.context() as patch:

        def full(path: epath.Path, text: str) -> None:
            raise StorageError(f"cannot write '{path}': No space left on device; free some space")

        patch.setattr(storage, "write_text", full)
        for step in range(1, 5):
            writer.log(step, {"train/loss": 1.0})
            writer.join()
    assert [r.getMessage().count("No space left") for r in caplog.records if r.levelno >= logging.WARNING] == [1]
    writer.log(5, {"train/loss": 1.0})
    writer.close()
    assert [row["step"] for row in read_rows(epath.Path(tmp_path))] == [1, 2, 3, 4, 5]


def test_tensorboard_has_the_scalars_and_its_failure_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = MetricWriter(epath.Path(tmp_path))
    writer.log(1, {"train/loss": 0.5}, {"throughput/mfu": 0.25})
    writer.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes() and b"throughput/mfu" in events.read_bytes()

    writer = MetricWriter(epath.Path(tmp_path), restored_step=1)

    def fail(*_: Any) -> None:
        raise RuntimeError("the event thread died")

    monkeypatch.setattr(writer._trackers[0], "log", fail)
    for step in (2, 3):
        writer.log(step, {"train/loss": 0.4})
    monkeypatch.undo()
    writer.close()
    assert caplog.text.count("the event thread died") == 1
    assert [row["step"] for row in read_rows(epath.Path(tmp_path))] == [1, 2, 3]
