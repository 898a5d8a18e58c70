"""Rows of JSON in storage that can neither append nor rename, equal byte for byte after a kill and a resume."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from bertgpt_jax.training import storage

log = logging.getLogger(__name__)

SEGMENT_ROWS = 512
"""Rows of one object; a flush rewrites at most the last one."""


def to_number(value: Any) -> float | int | None:
    """A Python number; None if it is not finite. float32 and bfloat16 become the shortest decimal that names them."""
    array = np.asarray(value)
    if array.dtype.kind in "iub":
        return int(array)
    number = float(array)
    if not math.isfinite(number):
        return None
    return float(str(np.float32(number))) if array.dtype.itemsize <= 4 else number


class RowLog:
    """`<name>.jsonl` without append: segments of rows are rewritten whole, and joined when asked.

    `<name>/<index of its first row>.jsonl` are the segments. They are written one at a time and never together with the
    joined file, so that whenever the writer is killed, every row that was joined is whole in one of them.

    Args:
        workdir: where.
        name: `metrics` or `timing`.
        restored_step: rows of later steps are dropped; None drops all (a fresh start).
    """

    def __init__(self, workdir: epath.Path, name: str, restored_step: int | None):
        self._joined = workdir / f"{name}.jsonl"
        self._segments = workdir / name
        found = read_lines(workdir, name)
        limit = -1 if restored_step is None else restored_step
        self._lines = [line for line in found if json.loads(line)["step"] <= limit]
        self._flushed = 0
        if found or storage.list_names(self._segments):
            self._restart()

    def _restart(self) -> None:
        """Makes the objects agree with the rows kept; the joined file first, while the segments are still whole."""
        self._write_joined()
        starts = [(int(n.removesuffix(".jsonl")), n) for n in _segment_names(self._segments)]
        for start, name in sorted(starts, reverse=True):
            if start >= len(self._lines):
                storage.delete(self._segments / name)
        self.flush()

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, as dicts."""
        return [json.loads(line) for line in self._lines]

    def append(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Adds a row in memory; steps must not decrease. Returns the row as it will be read."""
        row = {"step": int(step), **{key: to_number(value) for key, value in values.items()}}
        self._lines.append(json.dumps(row))
        return row

    def flush(self) -> None:
        """Writes the segments that have new rows. Raises `StorageError`."""
        while self._flushed < len(self._lines):
            start = self._flushed // SEGMENT_ROWS * SEGMENT_ROWS
            rows = self._lines[start : start + SEGMENT_ROWS]
            storage.write_text(self._segments / f"{start:09d}.jsonl", _text(rows))
            self._flushed = start + len(rows)

    def join(self) -> None:
        """`flush`, then writes the joined file. Raises `StorageError`."""
        self.flush()
        self._write_joined()

    def _write_joined(self) -> None:
        storage.write_text(self._joined, _text(self._lines))


def _text(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)


def _segment_names(directory: epath.Path) -> list[str]:
    return [n for n in storage.list_names(directory) if n.endswith(".jsonl") and n.removesuffix(".jsonl").isdigit()]


def _whole_lines(text: str | None) -> list[str]:
    """The lines of an object up to the first that is torn."""
    lines = []
    for line in (text or "").split("\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        lines.append(line)
    return lines


def read_lines(workdir: epath.Path, name: str) -> list[str]:
    """The rows of `<name>.jsonl` as lines of JSON, also those of segments not joined yet, without what is torn."""
    lines = _whole_lines(storage.read_text(workdir / f"{name}.jsonl"))
    for segment in _segment_names(workdir / name):
        start = int(segment.removesuffix(".jsonl"))
        if start + SEGMENT_ROWS <= len(lines):
            continue
        if start > len(lines):
            log.warning("%s/%s: rows %d to %d are missing", name, segment, len(lines), start)
            break
        rows = _whole_lines(storage.read_text(workdir / name / segment))
        if start + len(rows) > len(lines):
            lines[start:] = rows
    return lines


def read_rows(workdir: epath.Path, name: str = "metrics") -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl` or `timing.jsonl` as dicts, finished or not."""
    return [json.loads(line) for line in read_lines(workdir, name)]
