"""Which process of which job this is: said by settings, by a launcher, or by the cluster itself."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import socket
from collections.abc import Mapping

from bertgpt_jax.errors import ConfigError

KEY = "execution.distributed"
"""Where the settings of this lie in a run's config; messages name them by it."""


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process among those of the run.

    Attributes:
        coordinator: host:port of process 0.
        found: the cluster said so, not the settings.
    """

    coordinator: str
    num_processes: int
    process_id: int
    found: bool = False

    @property
    def host(self) -> str:
        """The coordinator's name or address, without brackets."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])


def checked(place: Place, environ: Mapping[str, str] = os.environ) -> Place:
    """The place itself, if it can be one.

    Raises:
        ConfigError: a process number that does not exist, an address that does not resolve, or one that only this
            machine can reach while the job has several.
    """
    if place.process_id >= place.num_processes:
        raise ConfigError(f"{KEY}.process_id {place.process_id} must be below num_processes {place.num_processes}")
    name = f"{KEY}.coordinator '{place.coordinator}'"
    try:
        if not 0 < place.port < 2**16 or not place.host:
            raise ValueError
        socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        raise ConfigError(
            f"{name} is not a reachable host:port; name the machine of process 0 and a free port"
        ) from None
    machines = several_machines(environ)
    if machines and is_loopback(place.host):
        raise ConfigError(
            f"{name} is a loopback address, which only the machine itself can reach, and {machines}; "
            "name process 0's machine as the others know it"
        )
    return place


def is_loopback(host: str) -> bool:
    """Whether a name or address leads back to the machine that uses it (`localhost`, 127.0.1.1, ::1)."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def several_machines(environ: Mapping[str, str] = os.environ) -> str:
    """What in the environment says that the job runs on more than one machine, for a message; else empty."""
    for name in ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SKYPILOT_NUM_NODES"):
        if environ.get(name, "1").isdigit() and int(environ.get(name, "1")) > 1:
            return f"{name}={environ[name]}"
    here, all_ = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""), environ.get("OMPI_COMM_WORLD_SIZE", "")
    if here.isdigit() and all_.isdigit() and int(here) < int(all_):
        return f"OMPI_COMM_WORLD_LOCAL_SIZE={here} of OMPI_COMM_WORLD_SIZE={all_}"
    if "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
        return f"TPU_WORKER_HOSTNAMES={environ['TPU_WORKER_HOSTNAMES'][:60]}"
    return ""


def detect(timeout: int, environ: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place as jax's own detection finds it: TPU pods and GKE, SLURM, Open MPI, Kubernetes jobs.

    jax keeps that detection to itself; where a version has it no more, the answer is None, and
    `jax.distributed.initialize()` alone decides.

    Raises:
        ConfigError: there is no cluster that jax knows, or it says too little.
    """
    try:
        from jax._src.clusters import ClusterEnv

        look = ClusterEnv.auto_detect_unset_distributed_params
    except (ImportError, AttributeError):
        return None
    given = environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        coordinator, processes, process, _ = look(given, None, None, None, None, timeout)
    except TypeError:  # the signature of another version
        return None
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{KEY}.auto=true: the cluster could not be read ({' '.join(str(error).split())})") from None
    if coordinator is None or processes is None or process is None:
        hint = "give execution.distributed.coordinator, num_processes and process_id"
        if "OMPI_COMM_WORLD_RANK" in environ and given is None:
            hint = "this Open MPI does not say where rank 0 is: " + hint
        raise ConfigError(f"{KEY}.auto=true, but this is no TPU pod, SLURM step, Open MPI or Kubernetes job; {hint}")
    return Place(coordinator, processes, process, found=True)
