"""Where the files of a source may be cut, so that several processes work on one."""

from __future__ import annotations

import gzip
from typing import BinaryIO

from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.corpus.files import SourceFile, open_bytes
from bertgpt_jax.corpus.tables import cut_table
from bertgpt_jax.corpus.tfds import cut_examples
from bertgpt_jax.errors import DataError

_SPLITTABLE = {"text", "jsonl", "wiki"}
MAX_FILE_DOCUMENT = 1 << 30


def cut_source(file: SourceFile, target: int, config: CorpusConfig) -> list[tuple[int, int, int]]:
    """(first, end, bytes of text) of the pieces of a file, of about `target` bytes each.

    Positions are bytes of the uncompressed file; of tables and TFDS files the numbers of rows, and the bytes estimates.
    """
    if file.format in ("parquet", "arrow"):
        return cut_table(file.path, file.format, target, config.fields)
    if file.format == "tfds":
        return cut_examples(file.path, config.split, target, config.fields)
    return [(lo, hi, hi - lo) for lo, hi in cut_file(file, target, config.separator)]


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
