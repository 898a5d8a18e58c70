"""From the bytes of a document to its text, by named steps that count what they do."""

from __future__ import annotations

import html
import re
from collections import Counter

from bertgpt_jax.corpus.config import CleaningConfig
from bertgpt_jax.corpus.sources import RawDocument
from bertgpt_jax.errors import DataError

CHANGES = ("invalid_utf8", "bom", "newlines", "html_entities", "control_characters", "gutenberg")
"""Steps that change a document; counted in documents."""
DROPS = ("empty", "title_stubs", "min_characters", "language", "max_characters", "duplicates")
"""Steps that drop a document; the last three are the filters."""
LANGUAGE = "language="
"""Counts whose names begin so are documents in that language that stayed, where the source is filtered by it."""

_LINE_CONTROLS = re.compile("[\x0b\x0c\x85]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_ANY_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_BOOK_START = re.compile(r"^\s*\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG[^*]{0,400}\*\*\*[^\n]*\n", re.M | re.I)
_BOOK_END = re.compile(
    r"^\s*(?:\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg)[^\n]*$", re.M | re.I
)


def clean(document: RawDocument, config: CleaningConfig, counts: Counter[str]) -> str | None:
    """The cleaned text, or None if the document is dropped; `counts` gets one for each step that did something.

    Raises:
        DataError: invalid UTF-8 under `invalid_utf8="error"`.
    """
    text = _decode(document, config, counts)
    steps = (
        ("bom", config.bom, lambda t: t.lstrip("\ufeff")),
        ("newlines", config.newlines, lambda t: t.replace("\r\n", "\n").replace("\r", "\n") if "\r" in t else t),
        ("html_entities", config.html_entities, lambda t: html.unescape(t) if "&" in t else t),
        ("control_characters", config.control_characters, _without_controls),
        ("gutenberg", config.gutenberg, _without_licence),
    )
    for name, wanted, step in steps:
        if wanted:
            changed = step(text)
            counts[name] += changed != text
            text = changed
    reason = _why_drop(text, document, config)
    if reason:
        counts[reason] += 1
        return None
    return text


def _decode(document: RawDocument, config: CleaningConfig, counts: Counter[str]) -> str:
    raw = document.text
    if isinstance(raw, bytes):
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if config.invalid_utf8 == "error":
                byte = raw[error.start]
                raise DataError(f"byte 0x{byte:02x} at offset {document.offset + error.start} is not UTF-8") from None
            counts["invalid_utf8"] += 1
            return raw.decode("utf-8", "replace")
    if not _SURROGATES.search(raw):
        return raw
    if config.invalid_utf8 == "error":
        raise DataError(f"the document at offset {document.offset} holds a lone surrogate, which no UTF-8 can store")
    counts["invalid_utf8"] += 1
    return _SURROGATES.sub("\ufffd", raw)


def _without_controls(text: str) -> str:
    return _CONTROLS.sub("", _LINE_CONTROLS.sub("\n", text)) if _ANY_CONTROL.search(text) else text


def _without_licence(text: str) -> str:
    """The text between Project Gutenberg's START and END lines, if it has a START line."""
    start = _BOOK_START.search(text) if "***" in text else None
    if start is None:
        return text
    end = _BOOK_END.search(text, start.end())
    return text[start.end() : end.start() if end else len(text)].strip("\n") + "\n"


def _why_drop(text: str, document: RawDocument, config: CleaningConfig) -> str | None:
    stripped = text.strip()
    if not stripped:
        return "empty"
    if config.title_stubs and document.titled and "\n" not in stripped:
        return "title_stubs"
    needed = config.min_characters
    if len(stripped) < needed or (needed > 1 and sum(not c.isspace() for c in stripped) < needed):
        return "min_characters"
    return None
