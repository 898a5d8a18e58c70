"""Processes of one job start together, end together, and start again where the exit code asks for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bertgpt_jax.commands import launch_local
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.parallel.distributed import DistributedConfig, from_environment

PLACE = "import os, sys, time; rank = int(os.environ['JAX_PROCESS_ID']); "


def launch(*arguments: str, code: str) -> int:
    return launch_local.main([*arguments, "--", sys.executable, "-c", PLACE + code])


def test_each_knows_its_place_and_lines_carry_the_number(capfd: pytest.CaptureFixture) -> None:
    code = "print(os.environ['JAX_NUM_PROCESSES'], rank, os.environ['XLA_FLAGS'].split('=')[-1])"
    assert launch("-n", "3", "--devices", "2", code=code) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[0] 3 0 2", "[1] 3 1 2", "[2] 3 2 2"]
    assert err == "3 processes ended with exit code 0\n"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("sys.exit(65 if rank == 1 else (time.sleep(0.5), 76)[1])", 65),  # the cause, not who noticed
        ("time.sleep(0.5 * rank); sys.exit(76)", 76),
        ("os.kill(os.getpid(), 9) if rank == 1 else time.sleep(60)", 137),
        ("os.abort() if rank == 1 else sys.exit(0)", 76),  # jax's way to end where a peer is gone
        ("os.abort() if rank == 1 else (time.sleep(0.5), sys.exit(65))", 65),
        ("sys.exit(134)", 76),  # the same, through a shell
    ],
)
def test_the_first_failure_ends_all(code: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_local, "GRACE_SECONDS", 1.0)
    before = time.monotonic()
    assert launch("-n", "2", code=code) == expected
    assert time.monotonic() - before < 30


@pytest.mark.parametrize(("code", "starts"), [(75, 3), (76, 3), (77, 1), (78, 1), (65, 1), (0, 1)])
def test_who_restarts(code: int, starts: int, tmp_path: Path) -> None:
    """75 and 76 start again, 77 and 78 stop: what every supervisor of a run should do."""
    log = tmp_path / "starts"
    text = f"open({str(log)!r}, 'a').write('x'); sys.exit({code})"
    assert launch("-n", "1", "--max-restarts", "2", code=text) == code
    assert len(log.read_text()) == starts


def test_a_restart_that_succeeds_is_success(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    text = f"n = len(open({str(log)!r}, 'a+').read()); f = open({str(log)!r}, 'a+'); f.seek(0); old = f.read(); "
    assert (
        launch("-n", "1", "--max-restarts", "5", code=text + "f.write('x'); sys.exit(75 if len(old) < 2 else 0)") == 0
    )
    assert log.read_text() == "xxx"


def test_signals_are_passed_on_and_not_restarted(tmp_path: Path, repository: Path) -> None:
    ready = tmp_path / "ready"
    child = (
        "import signal, sys, time, pathlib; signal.signal(signal.SIGTERM, lambda *a: sys.exit(75)); "
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    command = [sys.executable, "tools/launch_local.py", "-n", "1", "--max-restarts", "3", "--", sys.executable, "-c"]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    with subprocess.Popen([*command, child], cwd=repository, env=environment, stderr=subprocess.PIPE) as process:
        while not ready.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75


@pytest.mark.parametrize(
    "arguments", [["-n", "2"], ["-n", "0", "--", "true"], ["-n", "1", "--max-restarts", "-1", "--", "x"]]
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert launch_local.main(arguments) == 64
    assert capsys.readouterr().err.startswith("error: ")


def test_place_from_the_environment() -> None:
    environment = launch_local.process_environment("127.0.0.1:1", 4, 3, None)
    config = from_environment(DistributedConfig(), environment)
    assert (config.coordinator, config.num_processes, config.process_id) == ("127.0.0.1:1", 4, 3)
    given = DistributedConfig(coordinator="a:2", num_processes=2, process_id=1)
    assert from_environment(given, environment) == given
    assert from_environment(DistributedConfig(auto=True), environment) == DistributedConfig(auto=True)
    assert from_environment(DistributedConfig(), {"JAX_COORDINATOR_ADDRESS": "a:2"}) == DistributedConfig()
    with pytest.raises(ConfigError, match="num_processes.*four"):
        from_environment(DistributedConfig(), environment | {"JAX_NUM_PROCESSES": "four"})
