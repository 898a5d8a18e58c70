"""The directory an export makes: built beside its target, renamed when it is proven, gone when it is not."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from bertgpt_jax.errors import ConfigError, StorageError

MANIFEST = "manifest.json"


@contextlib.contextmanager
def building(out: str, source: str, needed_bytes: int) -> Iterator[Path]:
    """A directory to write into; at the end of the block it becomes `out`, with a manifest of every file's sha256.

    Args:
        source: what is exported; `out` may not lie in its checkpoints.
        needed_bytes: what will be written, about.

    Raises:
        ConfigError: `out` exists, or lies inside a checkpoint. StorageError: no space, or it cannot be written.
    """
    target = Path(os.path.abspath(os.path.expanduser(out)))
    _check(target, source)
    parent = next(p for p in target.parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise StorageError(f"'{parent}' has {free:,} bytes left, the export needs {needed_bytes:,}: free some space")
    work = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        remove_leftovers(target)
        work.mkdir(parents=True)
        yield work
        write_manifest(work)
        os.rename(work, target)
    except OSError as error:
        raise StorageError(f"cannot write '{target}': {error.strerror or error}; nothing is left there") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check(target: Path, source: str) -> None:
    if os.path.lexists(target):
        raise ConfigError(f"--out '{target}' exists; name another directory, or delete it")
    real, inside = (Path(os.path.realpath(path)) for path in (target, os.path.expanduser(source)))
    if "://" not in source and (real.is_relative_to(inside / "checkpoints") or real == inside):
        raise ConfigError(f"--out '{target}' lies inside the checkpoints of '{source}'; name a directory elsewhere")
    blocking = next((p for p in target.parents if p.exists()), Path("/"))
    if not blocking.is_dir():
        raise ConfigError(f"--out '{target}': '{blocking}' is a file; name a directory elsewhere")


def remove_leftovers(target: Path) -> None:
    """Deletes what exports to `target` left whose process is gone (killed)."""
    for path in target.parent.glob(f".{target.name}.*.partial"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def write_manifest(directory: Path) -> None:
    """manifest.json: size and sha256 of every other file."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    write_json(directory / MANIFEST, {"format_version": 1, "files": files})


def write_json(path: Path, tree: Any) -> None:
    """A JSON tree, indented, in the order given."""
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", "utf-8")


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `1000`.

    Raises:
        ConfigError: it is none of these or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** ["B", "KB", "MB", "GB"].index((match[2] or "B").upper())) if match else 0
    if size < 1:
        raise ConfigError(f"size '{text}' must be like 5GB, 200MB or a number of bytes above 0")
    return size
