"""A workdir on storage where nothing can be renamed, appended to or changed in place (a mounted bucket)."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

Run = Any  # conftest.Run
pytestmark = pytest.mark.timeout(600)


@pytest.mark.slow
def test_killed_and_resumed(undisturbed: Run, disturbed: Run) -> None:
    refuse = str(disturbed.workdir)
    for step in (7, 14):
        end = disturbed.train(refuse=refuse, signal=["SIGKILL", step], settled=True)
        assert end.code == -signal.SIGKILL, end
    end = disturbed.train(refuse=refuse)
    assert end.code == 0, end
    assert "resumed at step 12" in end.out
    assert "warning:" not in end.err, "rows and events are written, not warned about"
    assert disturbed.result() == undisturbed.result()
    assert {path.name for path in (disturbed.workdir / "checkpoints").iterdir()} == {
        path.name for path in (undisturbed.workdir / "checkpoints").iterdir()
    }


def test_the_harness_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would show nothing."""
    import builtins
    import importlib.util
    import io
    import os

    for module, name in ((builtins, "open"), (io, "open"), (os, "open")):
        monkeypatch.setattr(module, name, getattr(module, name))
    for name in ("rename", "replace", "renames", "link"):
        monkeypatch.setattr(os, name, getattr(os, name))
    spec = importlib.util.spec_from_file_location("faulty_train", Path(__file__).parent / "faulty_train.py")
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    inside, outside = tmp_path / "in", tmp_path / "out"
    for directory in (inside, outside):
        directory.mkdir()
        (directory / "a").write_text("one")
    faulty.refuse(str(inside))
    for attempt in (
        lambda d: (d / "a").rename(d / "b"),
        lambda d: (d / "a").replace(d / "b"),
        lambda d: os.replace(d / "a", outside / "c"),
        lambda d: open(d / "a", "a"),
        lambda d: (d / "a").open("r+"),
        lambda d: os.open(d / "a", os.O_WRONLY | os.O_APPEND),
    ):
        with pytest.raises(PermissionError):
            attempt(inside)
    assert (inside / "a").read_text() == "one"
    (inside / "a").write_text("two")
    assert (inside / "a").read_text() == "two"
    (outside / "a").rename(outside / "b")
    with (outside / "b").open("a") as file:
        file.write(" more")
    assert (outside / "b").read_text() == "one more"
