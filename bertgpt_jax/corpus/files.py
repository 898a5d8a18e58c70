"""Which files a source is, of which format, and where large ones may be cut."""

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
from bertgpt_jax.errors import ConfigError, DataError, StorageError

_MAGIC = {b"PAR1": "Parquet", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz",
          b"%PDF": "PDF", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}  # fmt: skip
_NOT_TEXT = {".parquet", ".arrow", ".array_record", ".tfrecord", ".npy", ".npz", ".bin", ".pkl", ".pt", ".zip", ".tar"}
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3", "turtledemo"}
_SPLITTABLE = {"text", "jsonl", "wiki"}
_BLOCK = 1 << 20
_WHOLE_DIGEST = 64 << 20
MAX_FILE_DOCUMENT = 1 << 30


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        path: where it is.
        name: how the manifest calls it: the path below what the files have in common.
        format: `text`, `file`, `jsonl`, `wiki` or `stdlib`.
        size: bytes on disk.
        digest: hash of the bytes (of 16 blocks and the size, for files over 64 MiB).
    """

    path: str
    name: str
    format: str
    size: int
    digest: str


@contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """Opens a file for reading, decompressing gzip by its first bytes; read errors become one-line errors."""
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if packed:
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield stream
            else:
                if path.endswith(".gz") and Path(path).stat().st_size:
                    raise DataError(f"{path} ends in .gz but is no gzip file: rename it or compress it again")
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from None


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
    paths = [path for pattern in patterns for path in _expand(pattern)]
    resolved: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in resolved:
            raise DataError(f"corpus.path names {path} twice: every file may be given once")
        resolved[path.resolve()] = path
    _check_complete(paths)
    parents = [path.parent for path in paths]
    common = _common_parent(parents)
    return tuple(_source_file(path, path.relative_to(common).as_posix(), config.format) for path in paths)


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    try:
        if path.is_file():
            return [path]
        if path.is_dir():
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


def _source_file(path: Path, name: str, wanted: str) -> SourceFile:
    if path.suffix in _NOT_TEXT:
        raise DataError(f"{path}: {path.suffix} is not read; convert it to .txt or .jsonl")
    with open_bytes(str(path)) as stream:
        head = stream.read(1 << 16)
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{path}: this is {kind}, not UTF-8 text; convert it first")
    if head.count(0) > len(head) // 100:
        raise DataError(f"{path}: this looks like a binary file ({head.count(0)} NUL bytes in its first {len(head)})")
    kind = wanted if wanted != "auto" else _detect(path, head)
    size = path.stat().st_size
    return SourceFile(str(path), name, kind, size, _digest(path, size))


def _detect(path: Path, head: bytes) -> str:
    """The format of a file by its name and its first 64 kB."""
    suffixes = [s for s in path.suffixes if s != ".gz"]
    if suffixes and suffixes[-1] in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffixes and suffixes[-1] == ".json":
        raise DataError(f"{path}: .json is one JSON value; write one object a line (.jsonl), or set corpus.format")
    if head.lstrip().startswith(b"<doc "):
        return "wiki"
    return "file" if b"Project Gutenberg" in head[:4096] else "text"


def _digest(path: Path, size: int) -> str:
    """blake2b of a file, or of 16 of its blocks if it is large; hex."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as stream:
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
            size = path.stat().st_size
            name = path.relative_to(root).as_posix()
            files.append(SourceFile(str(path), name, "stdlib", size, _digest(path, size)))
    if not files:
        raise StorageError(f"corpus.path = 'stdlib': {root} holds no Python sources; pass a text of your own")
    return tuple(files)


# ---------------------------------------------------------------- cuts


def cut_file(file: SourceFile, target: int, separator: str) -> list[tuple[int, int]]:
    """Byte ranges `[lo, hi)` of the uncompressed file that start at documents and hold about `target` bytes each.

    A gzip file is decompressed once. Formats that cannot be cut give one range.
    """
    with open_bytes(file.path) as stream:
        if file.format not in _SPLITTABLE:
            size = stream.seek(MAX_FILE_DOCUMENT + 1) if isinstance(stream, gzip.GzipFile) else file.size
            if size > MAX_FILE_DOCUMENT:
                rule = f"one document of over {MAX_FILE_DOCUMENT:,} bytes; use corpus.format=text"
                raise DataError(f"{file.path} is {rule}")
            return [(0, size)]
        ranges, lo = [], 0
        while True:
            hi = _next_document(stream, lo + target, file.format, separator)
            if hi is None:
                end = stream.seek(0, 2) if not isinstance(stream, gzip.GzipFile) else stream.tell()
                return [*ranges, (lo, end)] if end > lo or not ranges else ranges
            ranges.append((lo, hi))
            lo = hi


def _next_document(stream: BinaryIO, position: int, kind: str, separator: str) -> int | None:
    """Offset of the first document that certainly starts after `position`; None at the end of the file."""
    if stream.seek(position) < position:
        return None
    line = stream.readline()
    mark, parted = separator.encode(), False
    while line:
        offset = stream.tell()
        line = stream.readline()
        stripped = line.strip()
        if kind == "jsonl" or (kind == "wiki" and line.startswith(b"<doc ")):
            return offset if line else None
        if kind == "text" and line:
            if parted and stripped:
                return offset
            parted = stripped == mark if mark else not stripped
    return None
