"""Processes meet before jax starts: who is missing, doubled, elsewhere or different is named, in every process."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from bertgpt_jax.errors import ConfigError, PeerError
from bertgpt_jax.parallel import cluster, distributed, preflight
from bertgpt_jax.parallel.cluster import Place, checked
from bertgpt_jax.parallel.distributed import DistributedConfig

FACTS = {"seed": 0, "stages": [{"name": "short", "steps": 3}], "code": {"nn/blocks.py": "ab12"}}


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "LINGER", 0.5)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(*processes: tuple[int, int, dict[str, Any]], port: int = 0, elsewhere: int = -1, seconds: float = 1.0) -> list:
    """What `meet` says to each (process_id, num_processes, facts): None or its error; `elsewhere` has another port."""
    port = port or free_port()

    def one(entry: tuple[int, int, dict[str, Any]]) -> Exception | None:
        number, of, facts = entry
        mine = free_port() if number == elsewhere else port
        try:
            preflight.meet(Place(f"127.0.0.1:{mine}", of, number), facts, seconds)
        except (ConfigError, PeerError) as error:
            return error
        return None

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, processes))


def test_equal_processes_go_on_and_leave_the_port() -> None:
    port = free_port()
    assert run(*[(n, 4, FACTS) for n in range(4)], port=port, seconds=10) == [None] * 4
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize(
    ("odd", "change", "said"),
    [
        (2, {"seed": 1}, "process 2 has seed = 1, process 0 has 0; start all"),
        (0, {"seed": 1}, "process 0 has seed = 1, process 1 has 0; start all"),
        (3, {"stages": [{"name": "short", "steps": 4}]}, "process 3 has stages.0.steps = 4, process 0 has 3;"),
        (1, {"code": {"nn/blocks.py": "cd34"}}, "process 1 has code.nn/blocks.py = 'cd34', process 0 has 'ab12'"),
        (1, {"code": {}}, "process 1 has code.nn/blocks.py = None, process 0 has 'ab12'"),
        (2, {"seed": 1, "code": {}}, "process 2 has seed = 1, process 0 has 0; and in code.nn/blocks.py; start"),
    ],
)
def test_the_odd_one_is_named_in_every_process(odd: int, change: dict[str, Any], said: str) -> None:
    ends = run(*[(n, 4, FACTS | change if n == odd else FACTS) for n in range(4)], seconds=10)
    assert all(isinstance(end, ConfigError) and str(end).startswith(said) for end in ends), ends


def test_two_with_one_number() -> None:
    ends = run((0, 4, FACTS), (1, 4, FACTS), (1, 4, FACTS), (3, 4, FACTS), seconds=10)
    said = "execution.distributed.process_id 1 is given to two processes ("
    assert all(isinstance(end, ConfigError) and str(end).startswith(said) for end in ends), ends
    assert all(str(end).count("pid ") == 2 for end in ends)


@pytest.mark.parametrize("counts", [(2, 4, 4, 4), (4, 4, 3, 4)])
def test_they_disagree_about_how_many_they_are(counts: tuple[int, ...]) -> None:
    ends = run(*[(n, of, FACTS) for n, of in enumerate(counts)], seconds=5)
    assert all(isinstance(end, ConfigError) for end in ends), ends
    assert all("has execution.distributed.num_processes = " in str(end) for end in ends), ends


def test_one_does_not_come() -> None:
    ends = run((0, 3, FACTS), (1, 3, FACTS))
    assert all(isinstance(end, PeerError) and str(end).startswith("process 2 of 3 did not come") for end in ends), ends


def test_one_goes_elsewhere() -> None:
    ends = run(*[(n, 4, FACTS) for n in range(4)], elsewhere=2)
    assert all(isinstance(end, PeerError) and "process 2" in str(end) for end in ends), ends
    assert all("execution.distributed.coordinator" in str(end) for end in ends)
    assert "connection refused" in str(ends[2]) and "loopback" in str(ends[2])


def test_nobody_is_there() -> None:
    (end,) = run((1, 2, FACTS), seconds=0.5)
    assert isinstance(end, PeerError) and str(end).startswith("process 1: execution.distributed.coordinator '127.0.0.1")


def test_the_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (end,) = run((0, 2, FACTS), port=port)
    assert isinstance(end, ConfigError) and f"port {port} cannot be used on this machine" in str(end)


def test_something_else_answers_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(10)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        threading.Thread(target=answer, daemon=True).start()
        (end,) = run((1, 2, FACTS), port=other.getsockname()[1])
    assert isinstance(end, PeerError) and "was not reached" in str(end)


def test_strangers_do_not_disturb() -> None:
    port = free_port()

    def knock() -> None:
        for junk in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b'{"protocol": "x"}\n'):
            time.sleep(0.05)
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    s.sendall(junk)

    thread = threading.Thread(target=knock)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(preflight.meet, Place(f"127.0.0.1:{port}", 2, 0), FACTS, 10)
        time.sleep(0.1)
        thread.start()
        thread.join()
        second = pool.submit(preflight.meet, Place(f"127.0.0.1:{port}", 2, 1), FACTS, 10)
        assert first.result() is second.result() is None


def test_patience() -> None:
    here, there = Place("localhost:1", 2, 0), Place("192.0.2.7:1", 2, 0)
    assert (preflight.patience(here, None), preflight.patience(there, None)) == (12, 300)
    assert preflight.patience(here, 7) == preflight.patience(there, 7) == 7


# ---------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("place", "environ", "said"),
    [
        (Place("h:1", 2, 2), {}, "process_id 2 must be below num_processes 2"),
        (Place("no-such-host.invalid:1", 2, 1), {}, "no-such-host.invalid:1' is not a reachable"),
        (Place("127.0.0.1", 2, 1), {}, "'127.0.0.1' is not a reachable"),
        (Place("127.0.0.1:0", 2, 1), {}, "'127.0.0.1:0' is not a reachable"),
        (Place("127.0.0.1:70000", 2, 1), {}, "70000' is not a reachable"),
        (Place("127.0.0.1:99", 2, 1), {"SLURM_STEP_NUM_NODES": "2"}, "loopback address.*SLURM_STEP_NUM_NODES=2"),
        (Place("localhost:99", 2, 0), {"TPU_WORKER_HOSTNAMES": "a,b"}, "loopback address.*TPU_WORKER_HOSTNAMES=a,b"),
        (
            Place("[::1]:99", 8, 0),
            {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "8"},
            "loopback address.*LOCAL_SIZE=4 of OMPI_COMM_WORLD_SIZE=8",
        ),
    ],
)
def test_a_place_that_cannot_be(place: Place, environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checked(place, environ)


@pytest.mark.parametrize("environ", [{}, {"SLURM_STEP_NUM_NODES": "1"}, {"TPU_WORKER_HOSTNAMES": "localhost"}])
def test_loopback_is_fine_on_one_machine(environ: dict[str, str]) -> None:
    place = Place("127.0.0.1:99", 2, 1)
    assert checked(place, environ) is place


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"coordinator": "h:1"}, "give all three"),
        ({"num_processes": 2, "process_id": 1}, "give all three"),
        ({"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": 5}, "process_id 5"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        distributed.find_place(DistributedConfig(**settings))


CLUSTERS = {
    "slurm": (
        {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[003-004]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
         "SLURM_LOCALID": "0"},
        Place("node003:61441", 2, 1, True),
    ),
    "openmpi": (
        {"OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4",
         "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        Place("10.96.0.1:61442", 4, 3, True),
    ),
    "gke": (
        {"TPU_WORKER_HOSTNAMES": "localhost,job-1", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2",
         "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080"},
        Place("localhost:8482", 4, 3, True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, expected = CLUSTERS[name]
    for variable in ("KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    if name == "gke":
        from jax._src.clusters import cloud_tpu_cluster

        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    assert cluster.detect(5) == expected, "None: this jax shows its detection to nobody, or under another name"


def test_a_jax_that_shows_its_detection_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is then left to `jax.distributed.initialize` alone."""
    from jax._src.clusters import ClusterEnv

    monkeypatch.delattr(ClusterEnv, "auto_detect_unset_distributed_params")
    assert distributed.find_place(DistributedConfig(auto=True)) is None


def test_no_cluster_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR_ADDRESS", "SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConfigError, match=r"auto=true, but this is no TPU pod.*give execution.distributed.coordinator"):
        distributed.find_place(DistributedConfig(auto=True))
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(ConfigError, match="Open MPI does not say where rank 0 is"):
        distributed.find_place(DistributedConfig(auto=True))
