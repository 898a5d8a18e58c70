"""Source files in buckets, through fsspec."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, BinaryIO

from bertgpt_jax.errors import ConfigError, StorageError

if TYPE_CHECKING:  # importing it takes a tenth of a worker's start
    from etils import epath

_CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
"""Scheme to the module that serves it and the extra that brings it."""


def is_remote(path: object) -> bool:
    """Whether a path is an address with a scheme."""
    return "://" in str(path)


def find_remote(pattern: str) -> list[epath.Path]:
    """The files that an address, a directory or a glob in a bucket names, sorted; hidden ones below it left out.

    Raises:
        ConfigError: an unknown scheme, or its client is not installed.
        StorageError: the bucket refuses.
    """
    scheme, _, rest = pattern.partition("://")
    if scheme not in _CLIENTS:
        known = ", ".join(f"{name}://" for name in _CLIENTS)
        raise ConfigError(f"corpus.path = '{pattern}': unknown scheme '{scheme}://'; use a path or one of {known}")
    module, extra = _CLIENTS[scheme]
    if importlib.util.find_spec(module) is None:
        remedy = f"run: pip install 'bertgpt_jax[{extra}]'"
        raise ConfigError(f"corpus.path = '{pattern}' needs {module}, which is not installed; {remedy}")
    import fsspec
    from etils import epath

    try:
        files = fsspec.filesystem(scheme)
        if files.isfile(rest):
            found = [rest]
        elif any(mark in rest for mark in "*?["):
            found = [name for name in files.glob(rest) if files.isfile(name)]
        else:
            below = len(rest.rstrip("/")) + 1
            found = [name for name in files.find(rest) if not _hidden(name.lstrip("/")[below:])]
    except Exception as error:  # each client has its own
        raise StorageError(f"corpus.path = '{pattern}': {_reason(error)}") from None
    return [epath.Path(f"{scheme}://{name.lstrip('/')}") for name in sorted(found)]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def open_remote(address: str) -> BinaryIO:
    """A file in a bucket, read a few megabytes at a time; it can be sought in. OSError where that fails."""
    import fsspec

    scheme, _, rest = address.partition("://")
    try:
        return fsspec.filesystem(scheme).open(rest, "rb")
    except OSError:
        raise
    except Exception as error:
        raise OSError(None, _reason(error)) from None


def remote_status(address: str) -> tuple[int, int]:
    """Bytes of a file in a bucket, and when it was last written, in ns. OSError where the bucket refuses."""
    import fsspec

    scheme, _, rest = address.partition("://")
    try:
        files = fsspec.filesystem(scheme)
        files.invalidate_cache()
        return int(files.info(rest)["size"]), int(files.modified(rest).timestamp() * 1e9)
    except OSError:
        raise
    except Exception as error:
        raise OSError(None, _reason(error)) from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}; check the address and your credentials"
