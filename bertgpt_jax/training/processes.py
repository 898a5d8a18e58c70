"""What the processes of a run must agree on before they go on together; with one process, nothing happens here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bertgpt_jax import errors


def is_primary() -> bool:
    """Whether this is the process that writes metrics, status and lock."""
    return jax.process_index() == 0


def from_primary(value: Any) -> Any:
    """The primary process's `value` (a JSON tree) in every process; called by all of them."""
    if jax.process_count() == 1:
        return value
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


def all_agree(flag: bool) -> bool:
    """Whether `flag` holds in every process; called by all of them."""
    if jax.process_count() == 1:
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.int32(flag))))
