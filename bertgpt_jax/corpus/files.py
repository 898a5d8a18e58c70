"""Which files a source is, and of which format."""

from __future__ import annotations

import dataclasses
import glob
import gzip
import hashlib
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.corpus.remote import find_remote, is_remote, open_remote, remote_status
from bertgpt_jax.corpus.stdin import refuse_stdin
from bertgpt_jax.corpus.tables import TABLE_SUFFIXES, saved_files
from bertgpt_jax.corpus.tfds import PREFIX, find_examples
from bertgpt_jax.errors import ConfigError, DataError, StorageError

_MAGIC = {b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz",
          b"%PDF": "PDF", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}  # fmt: skip
_NOT_TEXT = {".array_record", ".tfrecord", ".npy", ".npz", ".bin", ".pkl", ".pt", ".zip", ".tar"}
_TABLE_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow"}
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3", "turtledemo"}
_WITHOUT_TEXT = {"parquet", "arrow", "tfds", "stdlib"}
FIELD_FORMATS = frozenset({"jsonl", "parquet", "arrow", "tfds"})
"""Formats whose documents have fields beside the text."""
_BLOCK = 1 << 20
_WHOLE_DIGEST = 64 << 20


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        path: where it is.
        name: how the manifest calls it: the path below what the files have in common.
        format: `text`, `file`, `jsonl`, `wiki`, `stdlib`, `parquet`, `arrow` or `tfds`.
        size: bytes on disk.
        digest: hash of the bytes (of 16 blocks and the size, for files over 64 MiB).
        mtime_ns: when it was last written, in ns; while it is the same, the digest is not computed again.
    """

    path: str
    name: str
    format: str
    size: int
    digest: str
    mtime_ns: int = 0


@contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """Opens a file for reading, decompressing gzip by its first bytes; read errors become one-line errors."""
    try:
        with _open(path) as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if packed:
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield stream
            else:
                if path.endswith(".gz") and raw.seek(0, os.SEEK_END):
                    raise DataError(f"{path} ends in .gz but is no gzip file: rename it or compress it again")
                raw.seek(0)
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from None


def _open(path: str | Path) -> BinaryIO:
    return open_remote(str(path)) if is_remote(path) else open(path, "rb")


def _status(path: str | Path) -> tuple[int, int]:
    """Bytes of a file, and when it was last written, in ns."""
    if is_remote(path):
        return remote_status(str(path))
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


# ---------------------------------------------------------------- discovery


def find_files(config: CorpusConfig) -> tuple[SourceFile, ...]:
    """The files `config.path` names, in a fixed order, with their formats.

    Raises:
        ConfigError: the path is empty or matches nothing.
        DataError: a file is given twice, is no text, or a `-of-NNNNN` set is incomplete.
        StorageError: a file cannot be read.
    """
    if config.path == "stdlib" or config.format == "stdlib":
        return _stdlib_files()
    patterns = (config.path,) if isinstance(config.path, str) else config.path
    if not any(p.strip() for p in patterns):
        raise ConfigError("corpus.path is empty: this config needs your text; pass corpus.path=FILE")
    refuse_stdin(patterns)
    if config.format == "tfds" and not all(p.startswith(PREFIX) for p in patterns):
        raise ConfigError(f"corpus.format = 'tfds': corpus.path = {config.path!r} must name a data set, '{PREFIX}NAME'")
    found = [(path, pattern) for pattern in patterns for path in _expand(pattern, config)]
    resolved: dict[Path, Path] = {}
    for path, _ in found:
        if path.resolve() in resolved:
            raise DataError(f"corpus.path names {path} twice: every file may be given once")
        resolved[path.resolve()] = path
    _check_complete([path for path, pattern in found if not pattern.startswith(PREFIX)])
    common = _common_parent([path.parent for path, _ in found])
    files = []
    for path, pattern in found:
        kind = "tfds" if pattern.startswith(PREFIX) else config.format
        files.append(_source_file(path, path.relative_to(common).as_posix(), kind))
    _check_fields(files, config)
    return tuple(files)


def _expand(pattern: str, config: CorpusConfig) -> list[Path]:
    if pattern.startswith(PREFIX):
        return find_examples(pattern, config.split, config.data_dir)
    if is_remote(pattern) and not pattern.startswith("file://"):
        remote = find_remote(pattern)
        if not remote:
            raise ConfigError(f"corpus.path = '{pattern}': no file matches; pass an address, a directory or a glob")
        return remote
    path = Path("/" + pattern.removeprefix("file://").lstrip("/") if is_remote(pattern) else pattern).expanduser()
    try:
        if path.is_file():
            return [path]
        if path.is_dir():
            saved = saved_files(path, config.split) if config.format in ("auto", "arrow") else None
            if saved is not None:
                return saved
            inside = [p for p in path.rglob("*") if not any(x.startswith(".") for x in p.relative_to(path).parts)]
            found = sorted(p for p in inside if p.is_file())
            if not found:
                raise ConfigError(f"corpus.path = '{pattern}': the directory holds no files")
            return found
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    except PermissionError as error:
        raise StorageError(f"corpus.path = '{pattern}': {error.strerror}: {error.filename}") from None
    if not found:
        rule = "no file matches" if glob.has_magic(pattern) else "no such file or directory"
        raise ConfigError(f"corpus.path = '{pattern}': {rule}; pass a file, a directory, a glob or 'stdlib'")
    return found


def _check_complete(paths: list[Path]) -> None:
    """Refuses a set of `name-00002-of-00004` files with members missing."""
    sets: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        match = re.search(r"^(.*)-(\d+)-of-(\d+)", path.name)
        if match:
            sets.setdefault((str(path.parent / match[1]), int(match[3])), set()).add(int(match[2]))
    for (stem, total), present in sets.items():
        missing = sorted(set(range(total)) - present)
        if missing:
            names = ", ".join(f"{Path(stem).name}-{i:05d}-of-{total:05d}" for i in missing[:5])
            raise DataError(f"corpus.path: {len(missing)} of {total} shards of {stem} are missing: {names}")


def _common_parent(parents: list[Path]) -> Path:
    common = parents[0]
    while not all(common == p or common in p.parents for p in parents):
        common = common.parent
    return common


def _check_fields(files: list[SourceFile], config: CorpusConfig) -> None:
    """A language is read from a field, which text has not; nor has it splits."""
    if config.split != "train" and not any(file.format in ("tfds", "arrow") for file in files):
        rule = f"{files[0].path} is {files[0].format}, which has no splits; leave it out"
        raise ConfigError(f"corpus.split = '{config.split}': {rule}")
    without = [file for file in files if file.format not in FIELD_FORMATS]
    if config.filters.languages and without:
        rule = f"{without[0].path} is {without[0].format} and has no fields ({', '.join(sorted(FIELD_FORMATS))} have)"
        raise ConfigError(f"corpus.filters.language_field = '{config.filters.language_field}': {rule}")


def _source_file(path: Path, name: str, wanted: str) -> SourceFile:
    with open_bytes(str(path)) as stream:
        head = stream.read(1 << 16)
    kind = wanted if wanted != "auto" else _detect(path, head)
    if kind not in _WITHOUT_TEXT:
        _check_text(path, head)
    elif is_remote(path):
        raise DataError(f"{path}: {kind} is read from this machine's files only; copy it here first")
    try:
        size, written = _status(path)
        return SourceFile(str(path), name, kind, size, _digest(path, size), written)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from None


def _check_text(path: Path, head: bytes) -> None:
    if path.suffix in _NOT_TEXT:
        advice = f"; pass '{PREFIX}NAME' and corpus.data_dir" if path.suffix == ".array_record" else ""
        raise DataError(f"{path}: {path.suffix} is not read{advice or '; convert it to .txt or .jsonl'}")
    for magic, kind in (_MAGIC | _TABLE_MAGIC).items():
        if head.startswith(magic):
            raise DataError(f"{path}: this is {kind}, not UTF-8 text; convert it first")
    if head.count(0) > len(head) // 100:
        raise DataError(f"{path}: this looks like a binary file ({head.count(0)} NUL bytes in its first {len(head)})")


def check_unchanged(file: SourceFile) -> None:
    """Compares a file with what it was when the build was planned.

    Raises:
        DataError: it has changed since, or is gone.
    """
    try:
        size, written = _status(file.path)
        if (size, written) == (file.size, file.mtime_ns):
            return
        changed = size != file.size or _digest(file.path, size) != file.digest
        now = f"it had {file.size:,} bytes and has {size:,}"
    except OSError as error:
        changed, now = True, f"now: {error.strerror or error}"
    if changed:
        raise DataError(f"{file.path} changed while it was read ({now}); prepare from a copy that nothing writes to")


def _detect(path: Path, head: bytes) -> str:
    """The format of a file by its name and its first 64 kB."""
    suffixes = [s for s in path.suffixes if s != ".gz"]
    if suffixes and suffixes[-1] in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffixes and suffixes[-1] == ".json":
        raise DataError(f"{path}: .json is one JSON value; write one object a line (.jsonl), or set corpus.format")
    for magic, kind in _TABLE_MAGIC.items():
        if head.startswith(magic):
            return kind
    if path.suffix in TABLE_SUFFIXES:
        return TABLE_SUFFIXES[path.suffix]
    if head.lstrip().startswith(b"<doc "):
        return "wiki"
    return "file" if b"Project Gutenberg" in head[:4096] else "text"


def _digest(path: str | Path, size: int) -> str:
    """blake2b of a file, or of 16 of its blocks if it is large; hex."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with _open(path) as stream:
        if size <= _WHOLE_DIGEST:
            for block in iter(lambda: stream.read(_BLOCK), b""):
                digest.update(block)
        else:
            for number in range(16):
                stream.seek((size - _BLOCK) * number // 15)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def _stdlib_files() -> tuple[SourceFile, ...]:
    """The sources of Python's standard library (no tests), and the topics of its language reference."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, inside, names in os.walk(root):
        inside[:] = sorted(n for n in inside if n not in _STDLIB_SKIPPED and not n.startswith("config-"))
        for path in sorted(Path(folder, name) for name in names if name.endswith(".py")):
            files.append(_source_file(path, path.relative_to(root).as_posix(), "stdlib"))
    if not files:
        raise StorageError(f"corpus.path = 'stdlib': {root} holds no Python sources; pass a text of your own")
    return tuple(files)
