"""Runs of `tiny.py` in processes of their own, that can be killed, and what they leave behind."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TIMEOUT = 500


def write_text(path: Path) -> Path:
    """300 documents of made-up words, a sentence a line, a blank line after each document."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(300)]

    def sentence() -> str:
        return " ".join(rng.choices(words, k=rng.randint(3, 12))) + ".\n"

    path.write_text("\n".join("".join(sentence() for _ in range(rng.randint(2, 10))) for _ in range(300)))
    return path


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir and the runs in it; all runs of one directory share their corpus and compiled programs."""

    directory: Path
    name: str

    @property
    def workdir(self) -> Path:
        """Where the run writes."""
        return self.directory / self.name

    def start(
        self,
        faults: dict[str, Any],
        *overrides: str,
        devices: int = 8,
        wrapped: str = "",
        package: Path = HERE.parent.parent,
    ) -> subprocess.Popen:
        """A process that trains; `wrapped` names its log of batches where there are several.

        `package` is the directory that the package is imported from.
        """
        patience = "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # as in tests/conftest.py
        flags = f"--xla_force_host_platform_device_count={devices} {patience}"
        environment = os.environ | {
            "XLA_FLAGS": flags,
            "PYTHONPATH": str(package),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        batches = self.directory / f"{self.name}.batches{wrapped}"
        command = [sys.executable, HERE / "faulty_train.py", json.dumps(faults), batches, HERE / "tiny.py"]
        command += [f"corpus.path={self.directory / 'text.txt'}", "--workdir", self.workdir, *overrides]
        pipe = subprocess.PIPE
        return subprocess.Popen(list(map(str, command)), env=environment, stdout=pipe, stderr=pipe, text=True)

    def train(self, *overrides: str, **faults: Any) -> Ended:
        """Trains in one process to its end, whatever it is."""
        return ended(self.start(faults, *overrides))

    def pair(self, faults: dict[str, Any], *overrides: str, second: tuple[str, ...] = ()) -> list[Ended]:
        """Trains in two processes of four devices; the second has the faults and the overrides in `second`."""
        return self.several(2, *overrides, odd=1, change=second, faults=faults)

    def several(
        self,
        count: int,
        *overrides: str,
        odd: int | None = None,
        change: tuple[str, ...] = (),
        faults: dict[str, Any] | None = None,
        package: Path = HERE.parent.parent,
    ) -> list[Ended]:
        """Trains in `count` processes of eight devices together.

        Process `odd` alone (None: all) has the faults, the overrides in `change`, and its package from `package`.
        """
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        place = "execution.distributed"
        common = (*overrides, f"{place}.coordinator=127.0.0.1:{port}", f"{place}.num_processes={count}")
        children = []
        for rank in range(count):
            mine = odd is None or rank == odd
            own = (*common, f"{place}.process_id={rank}", *(change if mine else ()))
            where = package if mine else HERE.parent.parent
            started = self.start(
                (faults or {}) if mine else {}, *own, devices=8 // count, wrapped=str(rank), package=where
            )
            children.append(started)
        try:
            with ThreadPoolExecutor(count) as waiting:
                return list(waiting.map(ended, children))
        finally:
            for child in children:
                child.kill()

    def status(self) -> dict[str, Any]:
        """STATUS.json."""
        return json.loads((self.workdir / "STATUS.json").read_text())

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        return [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]

    def batches(self) -> dict[tuple[int, int, int], str]:
        """(sequence length, number in its stage, row) -> digest, of all batches trained on, by any process."""
        found: dict[tuple[int, int, int], str] = {}
        for path in sorted(self.directory.glob(f"{self.name}.batches*")):
            for line in path.read_text().splitlines():
                note = json.loads(line)
                for row, digest in note["rows"].items():
                    key = (note["length"], note["batch"], int(row))
                    assert found.setdefault(key, digest) == digest, f"{key} was drawn twice and differs"
        return found

    def result(self) -> dict[str, Any]:
        """What must not depend on kills: final state, metrics and batches."""
        status = self.status()
        return {
            "step": status["step"],
            "reason": status["reason"],
            "state": status["state_fingerprint"],
            "last": status["metrics"],
            "metrics": (self.workdir / "metrics.jsonl").read_bytes(),
            "batches": self.batches(),
        }


def ended(process: subprocess.Popen) -> Ended:
    """Waits for a process, but not for ever; its seconds are those of the wait."""
    begun = time.monotonic()
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end after {TIMEOUT} s:\n{out}\n{err}") from None
    return Ended(process.returncode, out, err, time.monotonic() - begun)


@pytest.fixture(scope="session")
def faults_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for runs, with their text; the corpus is prepared by the first."""
    directory = tmp_path_factory.mktemp("faults")
    write_text(directory / "text.txt")
    return directory


@pytest.fixture(scope="session")
def undisturbed(faults_directory: Path) -> Run:
    """A run that nothing happened to."""
    run = Run(faults_directory, "undisturbed")
    end = run.train()
    assert end.code == 0, end
    return run


@pytest.fixture
def disturbed(faults_directory: Path, request: pytest.FixtureRequest) -> Run:
    """A run of the same config in a workdir of its own."""
    return Run(faults_directory, "".join(c if c.isalnum() else "_" for c in request.node.name))
