"""Where a corpus lies: a directory of this machine, or objects below an address (`gs://`, `s3://`) through TensorStore.

On a directory what is begun gets another name until it is whole. In a bucket there is no rename: objects are written
whole, in an order in which the last one says that the others are there (`done.json`, `manifest.json`).
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import tensorstore

from bertgpt_jax.errors import ConfigError, StorageError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_DRIVERS = {"gs": "gcs", "s3": "s3", "memory": "memory"}
SHARED = tensorstore.Context()
"""Connections are shared, and `memory://` (for tests; it ends with the process) is one place."""

T = TypeVar("T")


class BucketPath:
    """An object of a bucket, or what lies below its name; the part of pathlib's interface that a corpus needs.

    Raises (all methods): StorageError, naming the address, where the bucket refuses.
    """

    def __init__(self, address: str):
        match = _ADDRESS.fullmatch(address)
        assert match is not None
        self._scheme = match[1].lower()
        self._parts = tuple(part for part in match[2].split("/") if part)
        if self._scheme not in _DRIVERS:
            known = ", ".join(f"{scheme}://" for scheme in ("gs", "s3"))
            raise ConfigError(f"'{address}' has the unknown scheme '{self._scheme}://'; use a path or one of {known}")
        if not self._parts:
            raise ConfigError(f"'{address}' names no bucket; write '{self._scheme}://BUCKET/DIRECTORY'")

    def __str__(self) -> str:
        return f"{self._scheme}://{'/'.join(self._parts)}"

    def __truediv__(self, name: str) -> BucketPath:
        return BucketPath(f"{self}/{name}")

    @property
    def name(self) -> str:
        return self._parts[-1]

    def spec(self, directory: bool) -> dict[str, Any]:
        """The TensorStore kvstore of this object, or of what lies below it."""
        bucket, inside = self._parts[0], "/".join(self._parts[1:])
        path = f"{inside}/" if directory and inside else inside
        if self._scheme == "memory":
            return {"driver": "memory", "path": f"{bucket}/{path}"}
        spec = {"driver": _DRIVERS[self._scheme], "bucket": bucket, "path": path}
        return spec | (_s3_settings() if self._scheme == "s3" else {})

    def _do(self, action: str, directory: bool, operation: Callable[[tensorstore.KvStore], Any]) -> Any:
        try:
            store = tensorstore.KvStore.open(self.spec(directory), context=SHARED).result()
            return operation(store).result()
        except (ValueError, RuntimeError, OSError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise StorageError(f"cannot {action} '{self}': {reason}; check the address and your credentials") from None

    def read_bytes(self) -> bytes:
        """The object; FileNotFoundError if there is none."""
        found = self._do("read", False, lambda store: store.read(""))
        if found.state != "value":
            raise FileNotFoundError(2, "no such object", str(self))
        return found.value

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        self._do("write", False, lambda store: store.write("", data))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a bucket has no directories."""

    def is_file(self) -> bool:
        return len(self._parts) > 1 and self._do("look at", False, lambda store: store.read("")).state == "value"

    def keys(self) -> list[str]:
        """Names, below this one, of all objects there, sorted."""
        return sorted(key.decode() for key in self._do("list", True, lambda store: store.list()))

    def delete(self) -> None:
        """Deletes this object and all below it."""
        if len(self._parts) > 1:
            self._do("delete", False, lambda store: store.write("", None))
        self._do("delete", True, lambda store: store.delete_range(tensorstore.KvStore.KeyRange()))


Place = Path | BucketPath


def _s3_settings() -> dict[str, Any]:
    """What Amazon's own clients read from the environment: another server than Amazon's, the region, the keys."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    settings: dict[str, Any] = {"endpoint": endpoint.rstrip("/")} if endpoint else {}
    if region or endpoint:
        settings["aws_region"] = region or "us-east-1"
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else files are looked for, and each one missed is a line on stderr
        settings["aws_credentials"] = {"type": "environment"}
    return settings


def find_place(path: str | Path | BucketPath) -> Place:
    """The place a user named: a path, a `file://` address or one in a bucket.

    Raises:
        ConfigError: an unknown scheme, or no bucket.
    """
    if not isinstance(path, str):
        return path
    match = _ADDRESS.fullmatch(path)
    if match is None:
        return Path(path).expanduser()
    if match[1].lower() == "file":
        return Path("/" + match[2].partition("/")[2])
    return BucketPath(path)


def kvstore(place: Place) -> dict[str, Any]:
    """The TensorStore kvstore of a directory."""
    if isinstance(place, BucketPath):
        return place.spec(directory=True)
    return {"driver": "file", "path": str(place.absolute()) + "/"}


def array_context(cache_bytes: int) -> tensorstore.Context:
    """A context with a cache of its own; it shares everything else with all places."""
    return tensorstore.Context({"cache_pool": {"total_bytes_limit": cache_bytes}}, SHARED)


def write_whole(place: Place, text: str) -> None:
    """Writes a text that is there whole or not at all."""
    if isinstance(place, BucketPath):
        place.write_bytes(text.encode())
        return
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, place)


def remove_tree(place: Place) -> None:
    """Deletes what lies at and below a place, if anything."""
    if isinstance(place, BucketPath):
        place.delete()
    else:
        shutil.rmtree(place, ignore_errors=True)


def remove_named(place: Place, begins: tuple[str, ...]) -> None:
    """Deletes what lies in a directory under names that begin so, and the directory if it holds nothing else."""
    if isinstance(place, BucketPath):
        for name in {key.partition("/")[0] for key in place.keys()}:
            if name.startswith(begins):
                (place / name).delete()
        return
    for path in place.glob("*"):
        if path.name.startswith(begins):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    with suppress(OSError):
        place.rmdir()


def is_empty(place: Place) -> bool:
    """Whether nothing is there, or an empty directory."""
    if isinstance(place, BucketPath):
        return not place.is_file() and not place.keys()
    return not place.exists() or (place.is_dir() and not any(place.iterdir()))


@contextmanager
def local_copy(place: Place) -> Iterator[Path]:
    """A small file, or a directory of them, on this machine; what is in a bucket is copied for the while."""
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory() as folder:
        if place.is_file():
            Path(folder, place.name).write_bytes(place.read_bytes())
            yield Path(folder, place.name)
            return
        for key in place.keys():
            target = Path(folder, key)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((place / key).read_bytes())
        yield Path(folder)


def remove_leftovers(place: Place) -> None:
    """Deletes temporary directories and files of a corpus whose process is gone."""
    if isinstance(place, BucketPath):
        return
    for path in place.glob(".*"):
        pid = path.name.rpartition(".")[2]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
