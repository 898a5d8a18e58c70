"""The documents of a file, as the file has them: one generator for each format."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import re
from collections.abc import Iterator

from bertgpt_jax.corpus.config import FIELD_SETTINGS
from bertgpt_jax.corpus.files import SourceFile, open_bytes
from bertgpt_jax.corpus.tables import read_table
from bertgpt_jax.corpus.tfds import read_examples
from bertgpt_jax.errors import DataError

_BLOCK = 1 << 18


@dataclasses.dataclass(frozen=True)
class RawDocument:
    """A document before cleaning.

    Attributes:
        text: bytes as read, or str where the format decodes (JSON, Python).
        offset: byte position in the uncompressed file; for `stdlib` the number of the topic, for tables of the row.
        titled: whether the first line is the document's title (wiki).
        language: what the field of the language holds; "" where none was asked for, or it is empty.
    """

    text: bytes | str
    offset: int
    titled: bool = False
    language: str = ""


WRAPPED_FORMATS = frozenset({"text", "file", "stdlib"})
"""Formats whose lines may be wrapped: there a paragraph ends at a blank line, elsewhere at every line."""


def read_documents(
    file: SourceFile, lo: int, hi: int, text_field: str, separator: str, language_field: str = ""
) -> Iterator[RawDocument]:
    """The documents that start at positions `[lo, hi)` of the uncompressed file, a range made by `cut_source`.

    A field that is null is empty text in a table, and an error in JSON.

    Raises:
        DataError: naming file and line, for JSON that is none, a missing field, Python that does not parse.
    """
    fields = (text_field, language_field) if language_field else (text_field,)
    if file.format == "stdlib":
        yield from _stdlib_documents(file)
        return
    if file.format in ("parquet", "arrow"):
        yield from map(_row_document, read_table(file.path, file.format, lo, hi, fields))
        return
    if file.format == "tfds":
        yield from map(_row_document, read_examples(file.path, lo, hi, fields))
        return
    with open_bytes(file.path) as stream:
        if file.format == "file":
            yield RawDocument(stream.read(), 0)
            return
        stream.seek(lo)
        if file.format == "jsonl":
            yield from _jsonl_documents(file, _lines(stream, lo, hi), fields)
        elif file.format == "wiki":
            yield from _wiki_documents(_line_blocks(stream, lo, hi))
        else:
            yield from _text_documents(_lines(stream, lo, hi), separator)


def _lines(stream, lo: int, hi: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that start in [lo, hi)."""
    position = lo
    for line in io.BufferedReader(stream, _BLOCK):  # a gzip file's own lines are made in Python
        if position >= hi:
            return
        yield position, line
        position += len(line)


def _text_documents(lines: Iterator[tuple[int, bytes]], separator: str) -> Iterator[RawDocument]:
    mark = separator.encode()
    held: list[bytes] = []
    start = 0
    for offset, line in lines:
        stripped = line.strip()
        ends = stripped == mark if mark else not stripped
        if ends:
            if held:
                yield RawDocument(b"".join(held).strip(b"\r\n"), start)
            held = []
        elif held or stripped:
            if not held:
                start = offset
            held.append(line)
    if held:
        yield RawDocument(b"".join(held).strip(b"\r\n"), start)


def _line_blocks(stream, lo: int, hi: int) -> Iterator[tuple[int, bytes]]:
    """The lines that start in [lo, hi), many at a time: (offset of the first, all of them)."""
    position, rest = lo, b""
    while position < hi:
        block = stream.read(_BLOCK)
        data = rest + block
        end = data.rfind(b"\n") + 1 if block else len(data)
        if block and position + end >= hi:
            yield position, data[: data.find(b"\n", hi - position - 1) + 1]
            return
        if end:
            yield position, data[:end]
        if not block:
            return
        position, rest = position + end, data[end:]


_WIKI_MARK = re.compile(rb"^(?:<doc |</doc>)", re.M)


def _wiki_documents(blocks: Iterator[tuple[int, bytes]]) -> Iterator[RawDocument]:
    held: list[bytes] = []
    start, inside = 0, False
    for offset, lines in blocks:
        done = 0
        for mark in _WIKI_MARK.finditer(lines):
            if inside:
                yield _wiki_document([*held, lines[done : mark.start()]], start)
            held, inside = [], mark[0] == b"<doc "
            if inside:
                start = offset + mark.start()
                done = lines.find(b"\n", mark.end()) + 1 or len(lines)
        if inside:
            held.append(lines[done:])
    if inside:
        yield _wiki_document(held, start)


def _wiki_document(parts: list[bytes], start: int) -> RawDocument:
    return RawDocument(b"".join(parts).strip(), start, titled=True)


def _row_document(row: tuple[int, list[bytes | None]]) -> RawDocument:
    number, (text, *others) = row
    return RawDocument(text or b"", number, language=(others[0] or b"").decode("utf-8", "replace") if others else "")


def _jsonl_documents(
    file: SourceFile, lines: Iterator[tuple[int, bytes]], fields: tuple[str, ...]
) -> Iterator[RawDocument]:
    for offset, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace"))
        except ValueError as error:
            raise DataError(f"{_place(file, offset)}: not JSON ({error}): {line[:60]!r}") from None
        if not isinstance(row, dict):
            raise DataError(f"{_place(file, offset)}: {type(row).__name__}, not an object: {line[:60]!r}")
        for name, setting in zip(fields, FIELD_SETTINGS, strict=False):
            if name not in row:
                advice = f"fields: {sorted(row)}; set {setting}"
                raise DataError(f"{_place(file, offset)}: no field '{name}'; {advice}")
            if not isinstance(row[name], str) and not (row[name] is None and name != fields[0]):
                kind = type(row[name]).__name__
                raise DataError(f"{_place(file, offset)}: field '{name}' is {kind}, not a string")
        text, *others = (row[name] for name in fields)
        yield RawDocument(text, offset, language=(others[0] or "") if others else "")


def _place(file: SourceFile, offset: int) -> str:
    """`path:line` of a byte offset: errors are worth a second reading of the file."""
    with open_bytes(file.path) as stream:
        number = sum(1 for _ in _lines(stream, 0, offset)) + 1
    return f"{file.path}:{number}"


def _stdlib_documents(file: SourceFile) -> Iterator[RawDocument]:
    """A module's docstrings in the order of its source; or one document a topic of the language reference.

    The source is parsed, never imported: importing opens windows (`turtle`), prints (`this`) or starts browsers
    (`antigravity`).
    """
    with open_bytes(file.path) as stream:
        source = stream.read()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise DataError(f"{file.path}: Python's own source does not parse ({error})") from None
    if file.name.endswith("pydoc_data/topics.py"):
        value = next(node.value for node in tree.body if isinstance(node, ast.Assign))
        for number, text in enumerate(ast.literal_eval(value).values()):
            yield RawDocument(text, number)
        return
    docstrings = list(_docstrings(tree))
    if docstrings:
        yield RawDocument("\n\n".join(docstrings), 0)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, by going through statements only."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and text.strip():
            yield text.strip()
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.If | ast.Try):
            yield from _docstrings(child)
