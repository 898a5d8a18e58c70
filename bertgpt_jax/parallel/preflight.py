"""The processes of a run meet over plain TCP before jax starts, and compare what they bring.

jax would abort (SIGABRT, no exception) where a process is missing, comes twice or belongs to another run, and would
hang where their settings differ. So process 0 listens at the coordinator's port first: every other process says who it
is and what it brings, all get one verdict, and only then is the port left to jax. The port is as open as jax's own:
only for networks one trusts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from bertgpt_jax.config import differences
from bertgpt_jax.errors import ConfigError, PeerError
from bertgpt_jax.parallel.cluster import KEY, Place, is_loopback

PATIENCE = 300
"""Seconds without news after which processes that have not come are given up, on several machines."""

LOCAL_PATIENCE = 12
"""The same on one machine, where all start together."""

LINGER = 3.0
"""Seconds for which a bad verdict is still told to processes that come late."""

SILENCE = 20.0
"""Seconds after which a process 0 that says nothing, though it is connected, is taken for something else."""

_PROTOCOL = "bertgpt_jax preflight 1"
_LIMIT = 16 << 20
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Peer:
    """A process as it introduces itself.

    Attributes:
        process, of: its number, and how many it believes there are.
        where: `host, pid`, for messages.
        facts: JSON tree that all must bring alike.
    """

    process: int
    of: int
    where: str
    facts: dict[str, Any]


def patience(place: Place, seconds: int | None) -> float:
    """Seconds without news after which a process gives up: those asked for, else by whether others are far away."""
    return seconds or (LOCAL_PATIENCE if is_loopback(place.host) else PATIENCE)


def meet(place: Place, facts: dict[str, Any], seconds: float) -> None:
    """Returns when all processes of the run are there and bring the same.

    Args:
        facts: JSON tree (settings, versions, hashes of code).
        seconds: without news, after which to give up.

    Raises:
        ConfigError: the port is taken; two processes have one number; they disagree about how many they are, or about
            a fact: in every process, naming process and fact.
        PeerError: a process did not come, or process 0 cannot be reached.
    """
    if place.num_processes == 1:
        return
    me = Peer(place.process_id, place.num_processes, f"{socket.gethostname()}, pid {os.getpid()}", facts)
    if place.process_id == 0:
        _receive_all(place, me, seconds)
    else:
        _introduce(place, me, seconds)


# ---------------------------------------------------------------- the verdict


def verdict(peers: Sequence[Peer]) -> str:
    """What is wrong with processes that are all there, in one line; empty if nothing is.

    Args:
        peers: process 0 first.
    """
    seen: dict[int, Peer] = {}
    for peer in peers:
        if peer.process in seen:
            return (
                f"{KEY}.process_id {peer.process} is given to two processes ({seen[peer.process].where}; "
                f"{peer.where}); give each a number of its own"
            )
        seen[peer.process] = peer
    return unequal({p.process: {f"{KEY}.num_processes": p.of} for p in peers}) or unequal(
        {p.process: p.facts for p in peers}
    )


def unequal(facts: dict[int, dict[str, Any]]) -> str:
    """Which process differs from most others, and in what; empty if none does.

    Args:
        facts: JSON tree of each process; of two equal camps that of process 0 is right.
    """
    camps: dict[str, list[int]] = {}
    for process in sorted(facts):
        camps.setdefault(json.dumps(facts[process], sort_keys=True), []).append(process)
    if len(camps) == 1:
        return ""
    right = max(camps.values(), key=len)[0]
    odd = next(process for process in sorted(facts) if facts[process] != facts[right])
    found = differences(facts[right], facts[odd])
    first, *more = found
    others = f"; and in {', '.join(more[:_SHOWN])}" + (", ..." if len(more) > _SHOWN else "") if more else ""
    ours, theirs = (_short(value) for value in found[first])
    return f"process {odd} has {first} = {theirs}, process {right} has {ours}{others}; start all with the same"


def _short(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == 64 and " " not in value
    return repr(value[:12] if is_digest else value)


# ---------------------------------------------------------------- process 0


def _receive_all(place: Place, me: Peer, seconds: float) -> None:
    came: list[tuple[Peer, socket.socket]] = []
    with _listening(place) as server:
        try:
            _wait_for(server, place, came, lambda: len(came) == place.num_processes - 1, seconds)
            peers = [me, *(peer for peer, _ in came)]
            missing = sorted(set(range(place.num_processes)) - {peer.process for peer in peers})
            wrong, kind = verdict(peers), "ConfigError"
            if not wrong and missing:
                wrong, kind = _did_not_come(place, missing, seconds), "PeerError"
            told = 0
            while wrong and told < len(came):
                told = _tell(came, told, {"error": kind, "message": wrong})
                _wait_for(server, place, came, lambda: len(came) > told, LINGER)  # noqa: B023 (called at once)
            if wrong:
                raise ConfigError(wrong) if kind == "ConfigError" else PeerError(wrong)
            _tell(came, 0, {"error": None})
        finally:
            for _, connection in came:
                connection.close()


def _listening(place: Place) -> socket.socket:
    """A server where jax's own will be: on all addresses of this machine, or on JAX_COORDINATOR_BIND_ADDRESS."""
    host = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")
    both = socket.has_dualstack_ipv6() and host in ("", "::")
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, place.port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(
            f"process 0: {KEY}.coordinator '{place.coordinator}': port {place.port} cannot be used on this machine "
            f"({error.strerror}); is a process 0 of this or another run still there? end it, or name another port"
        ) from None


def _wait_for(
    server: socket.socket,
    place: Place,
    came: list[tuple[Peer, socket.socket]],
    done: Callable[[], bool],
    seconds: float,
) -> None:
    """Adds those who come to `came` until `done`, or until nobody has come for so many seconds."""
    deadline = spoke = time.monotonic()
    deadline += seconds
    while not done() and (left := deadline - time.monotonic()) > 0:
        server.settimeout(min(left, 2.0))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            _tell(came, 0, {"wait": True})
            if time.monotonic() - spoke > 30 and not done():
                spoke = time.monotonic()
                print(f"{len(came) + 1} of {place.num_processes} processes are here, waiting", file=sys.stderr)
            continue
        peer = _heard(connection)
        if peer is None:
            connection.close()  # a port scanner, a health check
            continue
        came.append((peer, connection))
        deadline = time.monotonic() + seconds


def _heard(connection: socket.socket) -> Peer | None:
    """The introduction of a process; None if it is none of ours."""
    try:
        connection.settimeout(10.0)
        said = _read(connection.makefile("rb"))
        if said is None or said.get("protocol") != _PROTOCOL:
            return None
        return Peer(int(said["process"]), int(said["of"]), str(said["where"]), dict(said["facts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tell(came: list[tuple[Peer, socket.socket]], first: int, answer: dict[str, Any]) -> int:
    """Sends an answer to all from `first` on, as far as they are still there; returns how many came so far."""
    for _, connection in came[first:]:
        try:
            connection.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            continue  # it has left; the others say so to each other
    return len(came)


def _did_not_come(place: Place, missing: list[int], seconds: float) -> str:
    who = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    who = f"process {who}" if len(missing) == 1 else f"processes {who}"
    return (
        f"{who} of {place.num_processes} did not come to process 0 within {seconds:.0f} s; what did they print? "
        f"do they have {KEY}.coordinator = '{place.coordinator}'?{_loopback_hint(place)}"
    )


def _loopback_hint(place: Place) -> str:
    return " (a loopback address: other machines cannot reach it)" if is_loopback(place.host) else ""


# ---------------------------------------------------------------- the others


def _introduce(place: Place, me: Peer, seconds: float) -> None:
    hello = json.dumps({"protocol": _PROTOCOL} | dataclasses.asdict(me)).encode() + b"\n"
    deadline, reason = time.monotonic() + seconds, "nobody answers"
    while time.monotonic() < deadline:
        try:
            answer = _ask(place, hello, min(SILENCE, max(deadline - time.monotonic(), 3.0)))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            time.sleep(0.3)
            continue
        if answer["error"] is None:
            return
        raise (ConfigError if answer["error"] == "ConfigError" else PeerError)(answer["message"])
    raise PeerError(
        f"process {me.process}: {KEY}.coordinator '{place.coordinator}' was not reached within {seconds:.0f} s "
        f"({reason.lower()}); is process 0 there, and is this its address?{_loopback_hint(place)}"
    )


def _ask(place: Place, hello: bytes, silence: float) -> dict[str, Any]:
    """The verdict of process 0, however long it waits for others, if it does not keep silent for so many seconds.

    Raises:
        OSError, ValueError: nobody is there, or it is not process 0 of a run.
    """
    with socket.create_connection((place.host, place.port), timeout=10.0) as connection:
        connection.settimeout(silence)
        connection.sendall(hello)
        stream = connection.makefile("rb")
        while (answer := _read(stream)) is not None:
            if "error" in answer:
                return answer
    raise ValueError("what answers there is no process 0 that waits")


def _read(stream: Any) -> dict[str, Any] | None:
    """One line of JSON; None at the end. ValueError if it is none."""
    line = stream.readline(_LIMIT)
    if not line:
        return None
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError("no process of a run")
    return found
