"""What the processes of a run must agree on before they go on together; with one process, nothing happens here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from bertgpt_jax import errors
from bertgpt_jax.parallel import distributed

MEETING_SECONDS = 24 * 3600
"""How long the processes wait for each other to prepare a corpus or compile."""


def is_primary() -> bool:
    """Whether this is the process that writes metrics, status and lock."""
    return jax.process_index() == 0


def meet(what: str) -> None:
    """Waits until every process has come here, however long one prepares or compiles; a dead one ends the wait.

    Collectives on the CPU give up after 30 seconds; whatever may keep processes apart for longer is to end with this.
    """
    multihost.get_barrier_sync_fn()(key=what, timeout_ms=MEETING_SECONDS * 1000)


def from_primary(value: Any) -> Any:
    """The primary process's `value` (a JSON tree) in every process; called by all of them."""
    if jax.process_count() == 1:
        return value
    meet("from_primary")
    data = json.dumps(value).encode() if is_primary() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    buffer = np.zeros(size, np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8)))


def on_primary(function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function` in the primary process alone; its JSON result, or its user error, reaches every process."""
    if jax.process_count() == 1:
        return function(*args)
    outcome: dict[str, Any] = {}
    failure: Exception | None = None
    if is_primary():
        try:
            outcome["result"] = function(*args)
        except Exception as error:  # the others must not wait for a process that is leaving
            failure = error
            outcome["error"] = [type(error).__name__, str(error)]
    outcome = from_primary(outcome)
    if failure is not None:
        raise failure
    if "error" in outcome:
        name, message = outcome["error"]
        raise getattr(errors, name, errors.PeerError)(message)
    return outcome["result"]


def everywhere(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in every process; where it fails in one, all end, and with the same exit code.

    Raises:
        UserError: this process's own, or that of the first process that failed, named.
    """
    if jax.process_count() == 1:
        return function(*args)
    result, failure, said = None, None, []
    try:
        result = function(*args)
    except Exception as error:  # the others must not wait for a process that is leaving
        failure, said = error, [type(error).__name__, str(error)]
    meet("everywhere")
    everyone = distributed.gathered(said)
    if failure is not None:
        raise failure
    for process, what in enumerate(everyone):
        if what:
            raise getattr(errors, what[0], errors.PeerError)(f"process {process}: {what[1]}")
    return result


def all_agree(flag: bool) -> bool:
    """Whether `flag` holds in every process; called by all of them."""
    if jax.process_count() == 1:
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.int32(flag))))
