"""Starting a run on several processes (`jax.distributed`) and agreeing on what it is."""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from pydantic import Field

from bertgpt_jax.config import Config, build, differences
from bertgpt_jax.errors import ConfigError, PeerError

LAST_SECONDS = 5.0
"""How long the coordinating process of a failed run lets the others end by themselves."""


class DistributedConfig(Config):
    """How processes find each other; all None for a single process.

    `auto` reads the cluster's own environment (TPU pods, SLURM, OpenMPI, GKE).
    """

    auto: bool = False
    coordinator: str | None = Field(default=None, description="host:port of process 0")
    num_processes: int | None = Field(default=None, ge=1)
    process_id: int | None = Field(default=None, ge=0)
    initialization_timeout: int = Field(default=300, ge=1, description="seconds")
    heartbeat_timeout: int = Field(default=100, ge=5, description="seconds until a dead peer ends the job")
    shutdown_timeout: int = Field(default=60, ge=1, description="seconds a process waits for the others when it ends")

    @property
    def is_set(self) -> bool:
        """Whether there is more than this process."""
        return self.auto or self.coordinator is not None


def from_environment(config: DistributedConfig, environ: Mapping[str, str] = os.environ) -> DistributedConfig:
    """`config`, or what a launcher says (JAX_COORDINATOR_ADDRESS, _NUM_PROCESSES, _PROCESS_ID) where it is silent.

    Raises:
        ConfigError: a number that is none.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [environ.get(name) for name in names]
    if config.auto or any(v is not None for v in (config.coordinator, config.num_processes, config.process_id)):
        return config
    if any(value is None for value in given):  # the address alone is for clusters that jax knows (auto)
        return config
    settings = config.model_dump() | dict(zip(("coordinator", "num_processes", "process_id"), given, strict=True))
    return build(DistributedConfig, settings, " ".join(names))


def initialize(config: DistributedConfig) -> None:
    """Joins the other processes, if there are any. Must precede any use of devices.

    Raises:
        ConfigError: incomplete or contradictory settings, an address that does not resolve.
    """
    given = [config.coordinator, config.num_processes, config.process_id]
    if config.auto:
        jax.distributed.initialize(
            initialization_timeout=config.initialization_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            shutdown_timeout_seconds=config.shutdown_timeout,
        )
        return
    if all(value is None for value in given):
        return
    if any(value is None for value in given):
        raise ConfigError(
            f"coordinator={config.coordinator}, num_processes={config.num_processes}, process_id={config.process_id}: "
            "give all three, or none for a single process"
        )
    if config.process_id >= config.num_processes:
        raise ConfigError(f"process_id {config.process_id} must be below num_processes {config.num_processes}")
    host, _, port = config.coordinator.rpartition(":")
    try:
        socket.getaddrinfo(host, int(port))
    except (OSError, ValueError):
        raise ConfigError(f"coordinator '{config.coordinator}' is not a reachable host:port") from None
    jax.distributed.initialize(
        config.coordinator,
        config.num_processes,
        config.process_id,
        initialization_timeout=config.initialization_timeout,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
        shutdown_timeout_seconds=config.shutdown_timeout,
    )


def as_peer_error(error: Exception) -> Exception:
    """A `PeerError`, if jax says that another process is gone or did not come to a collective in time; else `error`."""
    signs = ("gloo", "nccl", "coordination", "deadline_exceeded", "unavailable", "connection")
    text = " ".join(str(error).split())
    mine = jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError)
    if mine or not any(sign in text.lower() for sign in signs):
        return error
    peer = PeerError(f"another process failed or does not answer, see what it printed ({text[:200]})")
    peer.__cause__ = error
    return peer


def leave_alone(exit_code: int) -> None:
    """Lets this process end without the others: at exit, jax would wait for them and then abort.

    The one that coordinates leaves last, as those still there are aborted when it goes.
    """

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(0 if jax.process_index() else LAST_SECONDS)
        os._exit(exit_code)

    atexit.register(leave)


def agree(facts: dict[str, Any]) -> None:
    """Stops unless every process brings the same facts (settings, data, tokenizer, code); called by all of them.

    Args:
        facts: JSON tree.

    Raises:
        PeerError: in every process, naming the first process and fact that differ from process 0's.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    mine = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(mine.size)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: mine.size] = mine
    everyone = np.asarray(multihost_utils.process_allgather(padded))
    first, *others = (json.loads(bytes(row[:size])) for row, size in zip(everyone, sizes, strict=True))
    for process, theirs in enumerate(others, start=1):
        for fact, (ours, other) in differences(first, theirs).items():
            raise PeerError(
                f"process {process} has {fact} = {other!r}, process 0 has {ours!r}; start all with the same"
            )
