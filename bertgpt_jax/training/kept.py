"""Compiled programs that a run keeps for its next start, which then neither traces nor compiles them.

jax's own cache is asked with a traced program, so it spares no tracing. Here programs lie under all that they are made
of: the config, the mesh, the code of this package, the versions of all others, what sets XLA. A program of something
that changed is not found; one that cannot be read is made anew. They are code, and lie where nobody else may write.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pickle
import platform
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

import bertgpt_jax
from bertgpt_jax.config import Config, to_json

_SWITCHES = ("XLA_", "LIBTPU_", "TPU_", "CUDA_", "CUDNN_", "CUBLAS_", "NVIDIA_", "TF_", "JAX_")
"""How the variables begin that what XLA makes of a program may depend on."""

MOST = 64
"""Programs that a directory holds; those that were read last stay."""

_PROGRAM = "program"
"""What there is in a file: jax's form of a program (pickled, and machine code anyway) and of the trees around it."""

_FOUND = "/jax/compilation_cache/cache_hits"
"""What jax says when its cache has a program."""


def key(kind: str, config: Config, shape: Config | None, mesh: Mesh) -> str | None:
    """Hexadecimal name of a program: everything that it depends on. None if that is not known.

    Args:
        kind: which of the run's programs.
        shape: of its batch, where it has one.
    """
    surroundings = _surroundings()
    if surroundings is None:
        return None
    devices = [
        (d.id, d.process_index, d.device_kind, getattr(d, "coords", None), getattr(d, "core_on_chip", None))
        for d in mesh.devices.flat
    ]
    parts = {
        "kind": kind,
        "config": to_json(config),
        "shape": shape and to_json(shape),
        "mesh": [mesh.axis_names, mesh.devices.shape, devices],
        "platform": [mesh.devices.flat[0].client.platform, mesh.devices.flat[0].client.platform_version],
        "jax": {name: repr(value) for name, value in jax.config.values.items() if "cache" not in name},
        "surroundings": surroundings,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _surroundings() -> dict[str, Any] | None:
    """The code, what it runs on, and what sets it; None where a package that traces is not an installed release."""
    places = [Path(place) for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
    packages = [Path(sys.modules[name].__file__).parent for name in ("jax", "jaxlib", "flax", "optax")]
    if not {package.parent for package in packages} <= set(places):
        return None
    package = Path(bertgpt_jax.__file__).parent
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    releases = {path.name for place in places for path in place.glob("*.dist-info")}
    return {
        "code": code.hexdigest(),
        "releases": sorted(releases),
        "python": sys.version,
        "machine": [platform.machine(), _cpu_features()],
        "variables": {name: value for name, value in os.environ.items() if name.startswith(_SWITCHES)},
    }


def _cpu_features() -> str:
    """What Linux says that the first CPU can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def compiled(lowered: Any) -> tuple[Any, bool]:
    """A lowered program compiled; and whether it may be kept.

    What jax's cache had may not: XLA for CPUs (jaxlib 0.10.2) writes such a program without some of its functions.
    """
    hits, thread = _cache_hits(), threading.get_ident()
    before = hits[thread]
    program = lowered.compile()
    return program, hits[thread] == before


@functools.cache
def _cache_hits() -> Counter[int]:
    """How often jax's cache had what a thread compiled, counted from now on."""
    hits: Counter[int] = Counter()

    def listen(event: str, **_: Any) -> None:
        if event == _FOUND:
            hits[threading.get_ident()] += 1

    jax.monitoring.register_event_listener(listen)
    return hits


def load(directory: Path, name: str, mesh: Mesh) -> Any | None:
    """The program of that name, ready to be called; None where there is none that can be read."""
    file, devices = directory / name, list(mesh.devices.flat)
    try:
        with zipfile.ZipFile(file) as archive:  # it sees flipped bits
            parts = pickle.loads(archive.read(_PROGRAM))
        program = serialize_executable.deserialize_and_load(*parts, execution_devices=devices)
        program.memory_analysis()  # a run asks for it
        os.utime(file)
        return program
    except FileNotFoundError:
        return None
    except Exception:  # torn, or of an XLA that reads it differently: both cost what a first start costs
        return None


def save(directory: Path, name: str, program: Any) -> None:
    """Keeps a program, if it can be written; whoever reads meanwhile finds it whole or not at all.

    One that was discarded is not kept again.
    """
    part = directory / f"{name}.{os.getpid()}"
    try:
        if (directory / name).is_file() and (directory / name).stat().st_size == 0:
            return
        directory.mkdir(mode=0o700, exist_ok=True)
        with zipfile.ZipFile(part, "w") as archive:
            archive.writestr(_PROGRAM, pickle.dumps(serialize_executable.serialize(program)))
        part.replace(directory / name)
        for old in sorted(directory.iterdir(), key=lambda file: -file.stat().st_mtime)[MOST:]:
            old.unlink()
    except Exception:  # a program with a callback, a full disk: the run does not need it
        with contextlib.suppress(OSError):
            part.unlink()


def discard(directory: Path, names: Iterable[str]) -> None:
    """Empties the files of programs, for after a failure that may be theirs: starts compile them from now on."""
    for name in names:
        with contextlib.suppress(OSError):
            (directory / name).write_bytes(b"")
