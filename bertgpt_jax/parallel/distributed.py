"""Starting a run on several processes (`jax.distributed`) and agreeing on what it is."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from pydantic import Field

from bertgpt_jax.config import Config, build
from bertgpt_jax.errors import ConfigError, PeerError
from bertgpt_jax.parallel import cluster, preflight

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
    initialization_timeout: int | None = Field(
        default=None,
        ge=1,
        description="seconds without news until processes that do not come are given up; null: 300, on one machine 12",
    )
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


def initialize(config: DistributedConfig, facts: dict[str, Any]) -> None:
    """Joins the other processes, if there are any. Must precede any use of devices.

    Args:
        facts: JSON tree that every process must bring alike: settings, versions, hashes of code.

    Raises:
        ConfigError: incomplete or contradictory settings, an address that does not resolve, a port that is taken, a
            process that comes twice or brings something else.
        PeerError: a process that does not come.
    """
    place = find_place(config)
    if place is not None:
        preflight.meet(place, facts, preflight.patience(place, config.initialization_timeout))
    elif not config.auto:
        return
    explicit = () if place is None or place.found else (place.coordinator, place.num_processes, place.process_id)
    jax.distributed.initialize(
        *explicit,
        initialization_timeout=config.initialization_timeout or preflight.PATIENCE,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
        shutdown_timeout_seconds=config.shutdown_timeout,
    )


def find_place(config: DistributedConfig) -> cluster.Place | None:
    """The place of this process among those of the run; None if it is alone, or if only jax can tell.

    Raises:
        ConfigError: as `initialize` does, of this process alone.
    """
    if config.auto:
        found = cluster.detect(config.initialization_timeout or preflight.PATIENCE)
        return None if found is None else cluster.checked(found)
    given = [config.coordinator, config.num_processes, config.process_id]
    if all(value is None for value in given):
        return None
    if any(value is None for value in given):
        raise ConfigError(
            f"coordinator={config.coordinator}, num_processes={config.num_processes}, process_id={config.process_id}: "
            "give all three, or none for a single process"
        )
    return cluster.checked(cluster.Place(config.coordinator, config.num_processes, config.process_id))


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


def leave_alone(exit_code: int, last_seconds: float | None = None) -> None:
    """Lets this process end without the others: at exit, jax would wait for them and then abort.

    The one that coordinates leaves last, as those still there are aborted when it goes.

    Args:
        last_seconds: for which it stays; by default 0, of the coordinating process `LAST_SECONDS`.
    """

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        stays = (0.0 if jax.process_index() else LAST_SECONDS) if last_seconds is None else last_seconds
        time.sleep(stays)
        os._exit(exit_code)

    atexit.register(leave)


def gathered(value: Any) -> list[Any]:
    """The value (a JSON tree) of every process, in their order; called by all of them."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(mine.size)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: mine.size] = mine
    everyone = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:size])) for row, size in zip(everyone, sizes, strict=True)]


def agree(facts: dict[str, Any]) -> None:
    """Stops unless every process brings the same facts (data, tokenizer, identity); called by all of them.

    What is known before jax starts is compared there already (`initialize`).

    Args:
        facts: JSON tree.

    Raises:
        ConfigError: in every process, naming a process and the fact in which it differs.
    """
    problem = preflight.unequal(dict(enumerate(gathered(facts))))
    if problem:
        raise ConfigError(problem)
