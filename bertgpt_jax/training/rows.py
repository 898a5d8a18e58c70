"""Rows of JSON in storage that can neither append nor rename, equal byte for byte after a kill and a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from bertgpt_jax.training import storage

SEGMENT_ROWS = 2048
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

    `<name>/<index of its first row>.jsonl` are the segments; the last one is rewritten as it grows. Segments and joined
    file are never written together, and neither unless the other is whole: whenever, and however often, the writer is
    killed, every row that was joined is whole in one of them.

    Args:
        workdir: where.
        name: `metrics` or `timing`.
        restored_step: rows of later steps are dropped; None drops all (a fresh start).
    """

    def __init__(self, workdir: epath.Path, name: str, restored_step: int | None):
        self._joined = workdir / f"{name}.jsonl"
        self._segments = workdir / name
        limit = -1 if restored_step is None else restored_step
        segmented = _segmented_lines(self._segments)
        found = max(_whole_lines(storage.read_text(self._joined)), segmented, key=len)
        self._lines = [line for line in found if json.loads(line)["step"] <= limit]
        # what is not whole is repaired first, from the other
        if segmented[: len(self._lines)] == self._lines:
            self._repair_joined()
            self._repair_segments()
        else:
            self._repair_segments()
            self._repair_joined()
        self._flushed = len(self._lines)

    def _repair_joined(self) -> None:
        text = _text(self._lines)
        if (storage.read_text(self._joined) or "") != text:
            storage.write_text(self._joined, text)

    def _repair_segments(self) -> None:
        for name in reversed(_segment_names(self._segments)):
            if int(name.removesuffix(".jsonl")) >= len(self._lines):
                storage.delete(self._segments / name)
        for start in range(0, len(self._lines), SEGMENT_ROWS):
            path, text = self._segment(start), _text(self._lines[start : start + SEGMENT_ROWS])
            if storage.read_text(path) != text:
                storage.write_text(path, text)

    def _segment(self, start: int) -> epath.Path:
        return self._segments / f"{start:09d}.jsonl"

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
            storage.write_text(self._segment(start), _text(rows))
            self._flushed = start + len(rows)

    def join(self) -> None:
        """`flush`, then writes the joined file. Raises `StorageError`."""
        self.flush()
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


def _segmented_lines(directory: epath.Path) -> list[str]:
    """The lines of all segments, up to what is missing or torn."""
    lines: list[str] = []
    for name in _segment_names(directory):
        if int(name.removesuffix(".jsonl")) != len(lines):
            break
        lines += _whole_lines(storage.read_text(directory / name))
    return lines


def read_rows(workdir: epath.Path, name: str = "metrics") -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` or `timing.jsonl` as dicts, also those not joined yet, without what is torn."""
    joined = _whole_lines(storage.read_text(workdir / f"{name}.jsonl"))
    return [json.loads(line) for line in max(joined, _segmented_lines(workdir / name), key=len)]
