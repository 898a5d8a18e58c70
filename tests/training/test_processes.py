"""Two processes of four devices: one lock, one set of rows, collective saves and restores, one step to stop at."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bertgpt_jax.errors import ConfigError, DataError, PeerError
from bertgpt_jax.parallel import distributed
from bertgpt_jax.training import processes
from bertgpt_jax.training.checkpoint import list_steps, restore
from bertgpt_jax.training.fingerprint import state_fingerprint
from bertgpt_jax.training.rows import read_rows

_PROGRAM = """
import json, os, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
address, rank, workdir, foreign = sys.argv[1], int(sys.argv[2]), epath.Path(sys.argv[3]), sys.argv[4] == "foreign"
jax.distributed.initialize(address, 2, rank, initialization_timeout=60)
if foreign and rank == 1:
    signal.signal(signal.SIGTERM, lambda number, frame: print("foreign handler", file=sys.stderr, flush=True))
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.training import processes, status
from bertgpt_jax.training.checkpoint import Checkpoints
from bertgpt_jax.training.fingerprint import state_fingerprint
from bertgpt_jax.training.guards import PreemptionGuard
from bertgpt_jax.training.metrics import MetricWriter

out = {"devices": jax.device_count(), "mine": jax.local_device_count(), "errors": []}
out["primary says"] = processes.from_primary({"rank": rank})
out["agree"] = [processes.all_agree(True), processes.all_agree(rank == 0)]

def refuse():
    raise ConfigError("only the first process knew")

lock = status.acquire(workdir)
for attempt in (lambda: processes.on_primary(refuse), lambda: status.acquire(workdir)):
    try:
        attempt()
    except ConfigError as error:
        out["errors"].append(str(error))

mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
shardings = {"w": NamedSharding(mesh, P("a")), "step": NamedSharding(mesh, P())}
make = jax.jit(lambda n: {"w": jnp.arange(64.0).reshape(16, 4) + n, "step": n}, out_shardings=shardings)
step = jax.jit(lambda s: {"w": s["w"] * 2, "step": s["step"] + 1}, donate_argnums=0, out_shardings=shardings)
state = make(jnp.int32(0))
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
checkpoints = Checkpoints(workdir, 2)
writer = MetricWriter(workdir, tensorboard=False)
prints = {}
for n in range(1, 5):
    state = step(state)
    writer.log(n, {"train/loss": n / 8})
    writer.join()
    prints[n] = state_fingerprint(state)
    checkpoints.save(state, n, {"metrics": {"eval/loss": float(n)}})
checkpoints.wait()
out["kept"], out["fingerprints"] = checkpoints.steps(), prints
if rank == 0:  # the newest is damaged
    (workdir / "checkpoints" / "4" / "state" / "ocdbt.process_1" / "manifest.ocdbt").unlink()
    (workdir / "checkpoints" / "4" / "state" / "manifest.ocdbt").unlink()
restored, meta = checkpoints.restore_latest_valid(lambda _: abstract)
out["restored"] = [meta["step"], state_fingerprint(restored) == prints[meta["step"]]]

with PreemptionGuard() as guard:
    print(f"guarding {os.getpid()}", flush=True)
    n = 10
    while not guard.should_stop(n) and n < 2000:
        state = jax.block_until_ready(step(state))
        n += 1
        time.sleep(0.01)
    out["stopped"], out["reason"] = n, guard.reason
writer.close()
checkpoints.close()
lock.release()
print(json.dumps(out), flush=True)
"""


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("handler", ["none", "foreign"])
def test_two_processes(handler: str, tmp_path: Path, repository: Path) -> None:
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repository)}
    address = f"127.0.0.1:{_free_port()}"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, address, str(rank), str(tmp_path), handler],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    timer = threading.Timer(150, lambda: [child.kill() for child in children])
    timer.start()
    try:
        for child in children:
            assert child.stdout is not None
            said = iter(child.stdout.readline, "")
            assert any(line.startswith("guarding") for line in said), child.communicate()
        time.sleep(0.5)
        children[1].send_signal(signal.SIGTERM)
        ended = [child.communicate() for child in children]
    finally:
        timer.cancel()
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], ended
    first, second = (json.loads(text.splitlines()[-1]) for text, _ in ended)

    assert (first["devices"], first["mine"]) == (8, 4)
    assert first["primary says"] == second["primary says"] == {"rank": 0}
    assert first["agree"] == second["agree"] == [True, False]
    assert first["errors"][0] == second["errors"][0] == "only the first process knew"
    assert first["errors"][1] == second["errors"][1] and "is locked by host" in first["errors"][1]
    assert first["kept"] == second["kept"] == [1, 3, 4]
    assert first["fingerprints"] == second["fingerprints"] and len(set(first["fingerprints"].values())) == 4
    assert first["restored"] == second["restored"] == [3, True]
    assert first["stopped"] == second["stopped"] < 2000
    assert first["reason"] == second["reason"] == "preempted"
    assert ("foreign handler" in ended[1][1]) is (handler == "foreign")

    assert [row["step"] for row in read_rows(epath.Path(tmp_path))] == [1, 2, 3, 4]
    assert not (tmp_path / "run.lock").exists()
    assert list_steps(epath.Path(tmp_path)) == [1, 3]
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    wanted = {
        "w": jax.ShapeDtypeStruct((16, 4), "float32", sharding=NamedSharding(mesh, P("y", "x"))),
        "step": jax.ShapeDtypeStruct((), "int32", sharding=NamedSharding(mesh, P())),
    }
    state, _ = restore(epath.Path(tmp_path), wanted, 3)
    assert state_fingerprint(state) == first["fingerprints"]["3"]


def test_alone_nothing_is_exchanged() -> None:
    assert processes.is_primary()
    assert processes.from_primary({"a": 1}) == {"a": 1}
    assert processes.all_agree(True) and not processes.all_agree(False)
    assert processes.on_primary(lambda x: x + 1, 2) == 3
    with pytest.raises(ConfigError, match="told"):
        processes.on_primary(_refuse)


def _refuse() -> None:
    raise ConfigError("told")


@pytest.mark.parametrize(
    ("mine", "theirs", "raised", "said"),
    [
        (lambda: 7, [], None, ""),
        (_refuse, [], ConfigError, "^told$"),
        (lambda: 7, ["DataError", "shard 3 is missing"], DataError, "^process 1: shard 3 is missing$"),
        (lambda: 7, ["ZeroDivisionError", "by zero"], PeerError, "^process 1: by zero$"),
        (_refuse, ["DataError", "shard 3 is missing"], ConfigError, "^told$"),
    ],
)
def test_where_one_fails_all_end(mine, theirs, raised, said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each raises its own error, or that of the process that failed, of the same class: the exit codes are equal."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "meet", lambda what: None)
    monkeypatch.setattr(distributed, "gathered", lambda value: [value, theirs])
    if raised is None:
        assert processes.everywhere(mine) == 7
    else:
        with pytest.raises(raised, match=said):
            processes.everywhere(mine)
