"""Rows 71 to 73 of the list of bad inputs: devices that are not there, processes that cannot meet.

One line that names the thing and the value, the documented exit code, no abort of jax, nothing written. What processes
say to each other: tests/parallel/test_preflight.py; four real ones: test_four_processes.py.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from bertgpt_jax.commands import common, train

TINY = str(Path(__file__).parent / "tiny.py")
PLACE = "execution.distributed"
CONFIG, PEER = 78, 76

# (settings below `execution.distributed`, environment, exit code, what the line must hold); PORT is one in use,
# FREE one that is not.
ROWS = [
    (["coordinator=nowhere.invalid:8476", "num_processes=2", "process_id=1"], {}, CONFIG,
     ["coordinator 'nowhere.invalid:8476'", "host:port"]),
    (["coordinator=127.0.0.1", "num_processes=2", "process_id=1"], {}, CONFIG, ["'127.0.0.1'", "host:port"]),
    (["coordinator=127.0.0.1:http", "num_processes=2", "process_id=1"], {}, CONFIG, ["'127.0.0.1:http'"]),
    (["coordinator=127.0.0.1:FREE", "num_processes=2"], {}, CONFIG, ["process_id=None", "give all three"]),
    (["coordinator=127.0.0.1:FREE", "num_processes=2", "process_id=2"], {}, CONFIG,
     ["process_id 2", "num_processes 2"]),
    (["coordinator=127.0.0.1:FREE", "num_processes=0", "process_id=0"], {}, CONFIG, ["num_processes = '0'"]),
    (["coordinator=127.0.0.1:FREE", "num_processes=2", "process_id=1", "initialization_timeout=1"], {}, PEER,
     ["process 1", "coordinator '127.0.0.1:FREE' was not reached", "connection refused"]),
    (["coordinator=127.0.0.1:FREE", "num_processes=3", "process_id=0", "initialization_timeout=1"], {}, PEER,
     ["processes 1, 2 of 3 did not come", "coordinator = '127.0.0.1:FREE'"]),
    (["coordinator=127.0.0.1:PORT", "num_processes=2", "process_id=0"], {}, CONFIG,
     ["process 0", "port PORT cannot be used", "in use"]),
    (["coordinator=localhost:FREE", "num_processes=2", "process_id=0"], {"SLURM_STEP_NUM_NODES": "2"}, CONFIG,
     ["coordinator 'localhost:FREE' is a loopback address", "SLURM_STEP_NUM_NODES=2"]),
    (["auto=true"], {}, CONFIG, ["auto=true", "no TPU pod, SLURM"]),
    ([], {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:FREE", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, CONFIG,
     ["JAX_NUM_PROCESSES", "num_processes = 'two'"]),
]  # fmt: skip


@pytest.fixture
def ports() -> dict[str, str]:
    with socket.create_server(("", 0)) as used:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            free = s.getsockname()[1]
        yield {"PORT": str(used.getsockname()[1]), "FREE": str(free)}


def filled(text: str, ports: dict[str, str]) -> str:
    for name, port in ports.items():
        text = text.replace(f":{name}", f":{port}").replace(f"port {name}", f"port {port}")
    return text


@pytest.mark.parametrize(
    ("settings", "environ", "code", "said"),
    [pytest.param(*row, id=f"73-{i}-{'_'.join(row[0]) or 'environment'}"[:50]) for i, row in enumerate(ROWS)],
)
def test_row_73(settings, environ, code, said, ports, monkeypatch, capsys, tmp_path) -> None:
    for name in ("KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR_ADDRESS", "SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, filled(value, ports))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("jax was started"))
    monkeypatch.setattr("bertgpt_jax.parallel.preflight.LINGER", 0.1)
    argv = [TINY, "corpus.path=x", "--workdir", str(tmp_path / "run")]
    argv += [f"{PLACE}.{filled(setting, ports)}" for setting in settings]
    begun = time.monotonic()
    found = train.main(argv)
    err = capsys.readouterr().err
    assert time.monotonic() - begun < 5 or "nowhere.invalid" in " ".join(settings), "or the name server is slow"
    assert (found, err.count("\n")) == (code, 1) and err.startswith("error: "), err
    assert [part for part in said if filled(part, ports) not in err] == [], err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        ("Unable to initialize backend 'tpu': INTERNAL: no libtpu", ["no libtpu"]),
        (
            "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 4242.\nmore",
            ["--platform tpu", "already in use by process with pid 4242"],
        ),
    ],
)
def test_row_71_a_backend_that_does_not_start(raised: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise RuntimeError(raised)

    monkeypatch.setattr(jax, "default_backend", refuse)
    with pytest.raises(common.ConfigError) as error:
        common.check_platform("tpu")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_row_71_no_accelerator(repository: Path, tmp_path: Path) -> None:
    """A process of its own: jax takes its backends once."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {"PYTHONPATH": str(repository)}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(repository / "tools" / "train.py"), TINY, "corpus.path=x", "--platform", "gpu"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert ended.returncode == CONFIG and ended.stdout == "", ended
    line = ended.stderr.rstrip().splitlines()[-1]
    assert line.startswith("error: --platform gpu: jax") and "--platform cpu" in line
    assert "Traceback" not in ended.stderr and not list(tmp_path.iterdir())
