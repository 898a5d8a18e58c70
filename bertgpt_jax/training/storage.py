"""The one module through which the workdir is written (Orbax writes the arrays of checkpoints, see `checkpoint.py`).

A workdir may be a directory or a bucket (`gs://`, `s3://`), so nothing here appends, and nothing needs a rename: an
object is written whole, and whoever reads one accepts that it may be torn (the writer was killed) or missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from bertgpt_jax.errors import ConfigError, StorageError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://(.*)$", re.DOTALL)
_BUCKETS = {
    "gs": ("gcsfs", "pip install 'bertgpt_jax[gcs]'"),
    "s3": ("s3fs", "pip install 'bertgpt_jax[s3]'"),
}
"""Scheme of a bucket -> (module that serves it, how to get it)."""


# ---------------------------------------------------------------- the workdir's name


def workdir_path(text: str) -> epath.Path:
    """The workdir a user named, as an absolute path; nothing is created.

    Raises:
        ConfigError: empty, spaces at an end, `file://`, an unknown scheme, a bucket whose client is missing, a file.
    """
    if not text.strip():
        raise ConfigError("workdir is empty; pass --workdir DIR")
    if text != text.strip() or not text.isprintable():
        raise ConfigError(f"workdir {text!r} begins or ends with a space or holds a control character; remove it")
    scheme = _SCHEME.match(text)
    if scheme:
        return _bucket_path(text, scheme[1].lower(), scheme[2])
    if re.match(r"^(gs|s3|file):", text):
        raise ConfigError(f"workdir '{text}' is neither a path nor an address; write 'gs://BUCKET/...' or a path")
    path = Path(os.path.expanduser(text))
    if str(path).startswith("~"):
        raise ConfigError(f"workdir '{text}': no such home directory; write the path in full")
    path = Path(os.path.abspath(path))
    if "[" in str(path):  # Orbax takes it for a pattern when it puts a checkpoint together: none could be read back
        raise ConfigError(f"workdir '{text}': checkpoints cannot be kept under a path with '[' ('{path}'); rename it")
    existing = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not existing.is_dir():
        what = "is a file" if existing.is_file() else "cannot be followed (a broken or circular link?)"
        raise ConfigError(f"workdir '{text}': '{existing}' {what}; name a directory (it is made if it is missing)")
    return epath.Path(path)


def _bucket_path(text: str, scheme: str, rest: str) -> epath.Path:
    if scheme == "file":
        plain = "/" + rest.partition("/")[2]
        raise ConfigError(f"workdir '{text}' is a file:// address; write the path itself: '{plain}'")
    if scheme not in _BUCKETS:
        known = ", ".join(f"{s}://" for s in _BUCKETS)
        raise ConfigError(f"workdir '{text}' has the unknown scheme '{scheme}://'; use a path or one of {known}")
    if not rest.partition("/")[0]:
        raise ConfigError(f"workdir '{text}' names no bucket; write '{scheme}://BUCKET/DIRECTORY'")
    module, remedy = _BUCKETS[scheme]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"workdir '{text}' needs {module}, which is not installed; run: {remedy}")
    return epath.Path(f"{scheme}://{rest}")


def is_local(path: epath.Path) -> bool:
    """Whether `path` is on a filesystem of this machine (network mounts included), not in a bucket."""
    return not _SCHEME.match(str(path))


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def _as_storage_error(action: str, path: epath.Path) -> Iterator[None]:
    """Turns what filesystems and bucket clients raise into a `StorageError` naming the path."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "check the path, its permissions and the space left"
        raise StorageError(f"cannot {action} '{path}': {error.strerror or error}; {remedy}") from error
    except Exception as error:
        if is_local(path):
            raise
        raise StorageError(f"cannot {action} '{path}': {type(error).__name__}: {error}") from error


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a whole object, making its directory if needed.

    Raises:
        StorageError: naming the path and the reason.
    """
    with _as_storage_error("write", path):
        try:
            path.write_bytes(data)
        except FileNotFoundError:  # only the first object of a directory pays for making it
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def write_text(path: epath.Path, text: str) -> None:
    """`write_bytes` of UTF-8 text, newlines as given."""
    write_bytes(path, text.encode())


def write_json(path: epath.Path, tree: Any) -> None:
    """`write_text` of a JSON tree, indented, keys in the order given."""
    write_text(path, json.dumps(tree, indent=2) + "\n")


def make_directory(path: epath.Path) -> None:
    """Makes a directory and its parents; no error if it is there."""
    with _as_storage_error("make the directory", path):
        path.mkdir(parents=True, exist_ok=True)


# ---------------------------------------------------------------- reading


def read_bytes(path: epath.Path) -> bytes | None:
    """The whole object, or None if there is none.

    Raises:
        StorageError: if it is there and cannot be read.
    """
    with _as_storage_error("read", path):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None


def read_text(path: epath.Path) -> str | None:
    """The object as text, bytes that are not UTF-8 replaced (a torn or damaged object is the reader's to judge)."""
    data = read_bytes(path)
    return None if data is None else data.decode(errors="replace")


def read_json(path: epath.Path) -> Any:
    """The JSON tree of an object; None if it is missing or torn."""
    text = read_text(path)
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return None


def exists(path: epath.Path) -> bool:
    """Whether there is an object or directory at `path`."""
    with _as_storage_error("look at", path):
        return path.exists()


def is_directory(path: epath.Path) -> bool:
    """Whether `path` is a directory (in a bucket: whether objects lie under it)."""
    with _as_storage_error("look at", path):
        return path.is_dir()


def list_names(path: epath.Path) -> list[str]:
    """Names of what lies in a directory, sorted; empty if there is no such directory."""
    with _as_storage_error("list", path):
        try:
            return sorted(child.name for child in path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []


# ---------------------------------------------------------------- removing


def delete(path: epath.Path) -> None:
    """Deletes an object; no error if there is none."""
    with _as_storage_error("delete", path):
        path.unlink(missing_ok=True)


def delete_tree(path: epath.Path) -> None:
    """Deletes a directory and all in it; no error if there is none."""
    with _as_storage_error("delete", path):
        path.rmtree(missing_ok=True)


def copy_tree(source: epath.Path, target: epath.Path) -> None:
    """Copies a directory, object by object."""
    with _as_storage_error("copy", source):
        target.mkdir(parents=True, exist_ok=True)
        for child in source.iterdir():
            if child.is_dir():
                copy_tree(child, target / child.name)
            else:
                (target / child.name).write_bytes(child.read_bytes())


def move_tree(source: epath.Path, target: epath.Path) -> None:
    """Moves a directory: by rename where the filesystem can, else by copying everything and then deleting."""
    if is_local(source):
        try:
            os.rename(source, target)
            return
        except OSError:
            pass
    copy_tree(source, target)
    delete_tree(source)


# ---------------------------------------------------------------- what the storage can do


@dataclasses.dataclass(frozen=True)
class Probe:
    """What `probe` found: whether rename works, bytes free (None in a bucket), filesystem type (None if unknown)."""

    renames: bool
    free_bytes: int | None
    filesystem: str | None


def probe(workdir: epath.Path) -> Probe:
    """Makes the workdir and writes, reads, renames and deletes a small object in it.

    Raises:
        StorageError: if it cannot be made, written, or gives back other bytes.
    """
    name = f".probe-{os.uname().nodename}-{os.getpid()}"
    target, moved = workdir / name, workdir / f"{name}-moved"
    make_directory(workdir)
    write_bytes(target, name.encode())
    if read_bytes(target) != name.encode():
        raise StorageError(f"'{workdir}' gives back other bytes than were written to it; use another workdir")
    renames = False
    if is_local(workdir):
        with contextlib.suppress(OSError):
            os.rename(target, moved)
            renames = True
    delete(target)
    delete(moved)
    return Probe(renames, free_bytes(workdir), filesystem(workdir))


def check_writable(workdir: epath.Path) -> None:
    """Whether a local workdir could be written, as far as permissions tell; nothing is created.

    Raises:
        StorageError: naming the directory that refuses.
    """
    if not is_local(workdir):
        return
    existing = next(p for p in (Path(workdir), *Path(workdir).parents) if p.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(f"workdir '{workdir}': '{existing}' may not be written; change its mode or use another")


def free_bytes(path: epath.Path) -> int | None:
    """Bytes that can still be written where `path` is or would be; None in a bucket."""
    if not is_local(path):
        return None
    existing = next((p for p in (path, *path.parents) if p.exists()), None)
    return None if existing is None else shutil.disk_usage(existing).free


def filesystem(path: epath.Path) -> str | None:
    """Type of the filesystem of a local path (`ext4`, `nfs`, `tmpfs`: gone after a restart); None if unknown."""
    mounts = Path("/proc/mounts")
    if not is_local(path) or not mounts.is_file():
        return None
    best, kind = "", None
    for line in mounts.read_text().splitlines():
        _, mount, this_kind, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if Path(path).is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, this_kind
    return kind
