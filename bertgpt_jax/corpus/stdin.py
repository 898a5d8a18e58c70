"""Standard input as a source: kept as a file before it is read, so that a build can be started again."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import BinaryIO

from bertgpt_jax.config import build
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.errors import ConfigError, DataError, StorageError

STDIN = "-"
_BLOCK = 1 << 20


def spooled(config: CorpusConfig, directory: Path, stream: BinaryIO | None = None) -> CorpusConfig:
    """`config`, its path `-` replaced by the file below `directory` that standard input was copied to.

    The file is named by its content (`stdin-<digest>`): the same input, piped in again, is the same source.

    Args:
        stream: read instead of standard input.

    Raises:
        DataError: the input is empty or a terminal; the message names what earlier starts have kept.
        StorageError: the file cannot be written.
    """
    if config.path != STDIN:
        return config
    stream = stream or (sys.stdin.buffer if sys.stdin and not sys.stdin.isatty() else None)
    temporary = directory / f".{STDIN}.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        digest = _copy(stream, temporary) if stream else ""
        if not digest:
            kept = ", ".join(sorted(str(path) for path in directory.glob("stdin-*"))[:3])
            advice = f" or pass corpus.path={kept}, kept from before" if kept else ""
            raise DataError(f"corpus.path = '-': standard input is empty; pipe text into the command{advice}")
        file = directory / f"stdin-{digest}"
        os.replace(temporary, file)
    except OSError as error:
        raise StorageError(f"{directory}: cannot keep standard input ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return build(CorpusConfig, config.model_dump() | {"path": str(file)}, "corpus")


def refuse_stdin(patterns: tuple[str, ...]) -> None:
    """ConfigError if standard input is named where it cannot be kept, or beside other sources."""
    if STDIN in patterns:
        raise ConfigError("corpus.path: '-' stands alone, for prepare and train only; write the text to a file first")


def _copy(stream: BinaryIO, file: Path) -> str:
    """Copies all there is; returns a digest of it, or "" if that is nothing."""
    digest = hashlib.blake2b(digest_size=8)
    with open(file, "wb") as target:
        for block in iter(lambda: stream.read(_BLOCK), b""):
            target.write(block)
            digest.update(block)
        target.flush()
        os.fsync(target.fileno())
        return digest.hexdigest() if target.tell() else ""
