"""Tables of text: Parquet files, Arrow files and data sets that Hugging Face `datasets` saved to disk, read by pyarrow.

A row is a document. Positions are row numbers of the file; pieces are runs of whole row groups (Parquet) or record
batches (Arrow), and row groups larger than a piece are cut between rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertgpt_jax.corpus.config import FIELD_SETTINGS
from bertgpt_jax.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    import pyarrow

TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
_NAMES = {"parquet": "Parquet", "arrow": "Arrow"}
_ROWS_AT_A_TIME = 1024
_READ_BUFFER = 1 << 20

Piece = tuple[int, int, int]
"""First row, end row (exclusive), and about how many bytes of text they hold."""


# ---------------------------------------------------------------- data sets saved to disk


def saved_files(directory: Path, split: str) -> list[Path] | None:
    """The Arrow files of a data set that `save_to_disk` wrote to `directory`, in order; None if it is none.

    Other files there (`cache-*.arrow`) are no part of it.

    Raises:
        ConfigError: a `DatasetDict` without that split.
        DataError: a file is missing, the description is damaged, or rows are picked by an index on the side.
    """
    if (directory / "dataset_dict.json").is_file():
        splits = _description(directory / "dataset_dict.json", "splits")
        if split not in splits:
            raise ConfigError(f"corpus.split = '{split}': {directory} has {', '.join(map(repr, splits))}")
        directory = directory / split
    if not (directory / "state.json").is_file() or not (directory / "dataset_info.json").is_file():
        return None
    state = directory / "state.json"
    if _description(state, "_indices_data_files", optional=True):
        raise DataError(f"{state}: its rows are picked by an index; save it again after flatten_indices()")
    paths = [directory / str(row.get("filename")) for row in _description(state, "_data_files")]
    missing = [path.name for path in paths if not path.is_file() or path.parent != directory]
    if missing or not paths:
        raise DataError(f"{directory}: {len(missing)} of {len(paths)} files of state.json are missing: {missing[:5]}")
    return paths


def _description(path: Path, key: str, optional: bool = False) -> list[Any]:
    try:
        found = json.loads(path.read_text("utf-8")).get(key)
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); save the data set again") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(found, list) and not (optional and found is None):
        raise DataError(f"{path}: no list '{key}'; save the data set again")
    return found or []


# ---------------------------------------------------------------- pieces


def cut_table(path: str, kind: str, target: int, fields: tuple[str, ...]) -> list[Piece]:
    """Pieces of a table of about `target` bytes of text each; `fields` are the columns that will be read, text first.

    Raises:
        DataError: the file is no such table, is damaged or cut short, a field is missing or holds no text.
    """
    with _errors(path, kind):
        units = _row_groups(path, fields, target) if kind == "parquet" else _record_batches(path, fields)
    pieces: list[Piece] = []
    lo = end = held = 0
    for rows, size in units:
        if held and held + size > target:
            pieces.append((lo, end, held))
            lo, held = end, 0
        end += rows
        held += size
    return [*pieces, (lo, end, held)] if end > lo or not pieces else pieces


def _row_groups(path: str, fields: tuple[str, ...], target: int) -> list[tuple[int, int]]:
    """(rows, bytes of text) of each row group; a large one comes in equal parts."""
    import pyarrow.parquet

    units = []
    with pyarrow.parquet.ParquetFile(path) as file:
        _check_fields(path, file.schema_arrow, fields)
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == fields[0])
            parts = min(max(1, -(-size // target)), max(1, group.num_rows))
            cuts = [group.num_rows * i // parts for i in range(parts + 1)]
            units += [(hi - lo, -(-size // parts)) for lo, hi in zip(cuts, cuts[1:], strict=False)]
    return units


def _record_batches(path: str, fields: tuple[str, ...]) -> list[tuple[int, int]]:
    """(rows, bytes of text) of each record batch."""
    import pyarrow.compute

    units = []
    with _arrow_batches(path, fields) as batches:
        for batch in batches:
            size = pyarrow.compute.sum(pyarrow.compute.binary_length(_bytes_column(batch, 0))).as_py()
            units.append((batch.num_rows, size or 0))
    return units


# ---------------------------------------------------------------- rows


def read_table(path: str, kind: str, lo: int, hi: int, fields: tuple[str, ...]) -> Iterator[tuple[int, list[Any]]]:
    """(number, values of `fields` as bytes or None) of rows `[lo, hi)`.

    Raises:
        DataError: as `cut_table`.
    """
    with _errors(path, kind):
        batches = _parquet_rows(path, lo, hi, fields) if kind == "parquet" else _arrow_rows(path, lo, hi, fields)
        for first, batch in batches:
            batch.validate(full=True)
            columns = [_bytes_column(batch, i).to_pylist() for i in range(len(fields))]
            for number, values in enumerate(zip(*columns, strict=True), start=first):
                yield number, list(values)


def _parquet_rows(path: str, lo: int, hi: int, fields: tuple[str, ...]) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """(number of its first row, batch) of the rows asked for; reads no more of a row group than it has to hold."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, buffer_size=_READ_BUFFER, pre_buffer=False) as file:
        _check_fields(path, file.schema_arrow, fields)
        first, groups, position = 0, [], 0
        for number in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            if position < hi and position + rows > lo:
                first = first if groups else position
                groups.append(number)
            position += rows
        columns = list(dict.fromkeys(fields))
        for batch in file.iter_batches(_ROWS_AT_A_TIME, groups, columns, use_threads=False) if groups else ():
            yield from _between(batch.select(list(fields)), first, lo, hi)
            first += batch.num_rows


def _arrow_rows(path: str, lo: int, hi: int, fields: tuple[str, ...]) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    first = 0
    with _arrow_batches(path, fields) as batches:
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
                yield from _between(batch.slice(start, _ROWS_AT_A_TIME), first + start, lo, hi)
            first += batch.num_rows
            if first >= hi:
                return


def _between(batch: Any, first: int, lo: int, hi: int) -> Iterator[tuple[int, Any]]:
    """The rows of a batch that begins at row `first` which lie in [lo, hi)."""
    start, stop = max(lo - first, 0), min(hi - first, batch.num_rows)
    if start < stop:
        yield first + start, batch.slice(start, stop - start)


@contextmanager
def _arrow_batches(path: str, fields: tuple[str, ...]) -> Iterator[Iterator[pyarrow.RecordBatch]]:
    """The record batches of an Arrow file of either format, with the columns `fields`; mapped, not read."""
    import pyarrow

    with pyarrow.memory_map(path) as source:
        if source.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            _check_fields(path, file.schema, fields)
            yield (file.get_batch(i).select(list(fields)) for i in range(file.num_record_batches))
            return
        source.seek(max(0, source.size() - 4))
        if source.read(4) != bytes(4):  # a stream that was cut between two batches looks whole but for its end mark
            raise DataError(f"{path}: the Arrow stream of {source.size():,} bytes has no end; it was cut short")
        source.seek(0)
        stream = pyarrow.ipc.open_stream(source)
        _check_fields(path, stream.schema, fields)
        yield (batch.select(list(fields)) for batch in stream)


# ---------------------------------------------------------------- columns


def _check_fields(path: str, schema: pyarrow.Schema, fields: tuple[str, ...]) -> None:
    known = [name for name in schema.names if _holds_text(schema.field(name).type)]
    for name, setting in zip(fields, FIELD_SETTINGS, strict=False):
        if schema.names.count(name) != 1:
            wrong = "no field" if name not in schema.names else "more than one field"
            raise DataError(f"{path}: {wrong} '{name}'; fields: {sorted(schema.names)}; set {setting}")
        if name not in known:
            raise DataError(f"{path}: field '{name}' is {schema.field(name).type}, not text; fields of text: {known}")


def _holds_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    inner = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_string_view)
    tests += (types.is_binary, types.is_large_binary, types.is_binary_view)
    return any(test(inner) for test in tests)


def _bytes_column(batch: pyarrow.RecordBatch, index: int) -> pyarrow.Array:
    """A column of text as bytes: whether they are UTF-8 is decided where documents are cleaned."""
    import pyarrow

    column = batch.column(index)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary())


@contextmanager
def _errors(path: str, kind: str) -> Iterator[None]:
    """pyarrow's errors as ours."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise StorageError(f"{path}: cannot be read ({os.strerror(error.errno)})") from None
        reason = str(error).strip().split("\n")[0][:200]
        raise DataError(f"{path}: no {_NAMES[kind]} file, or a damaged one ({reason}); fetch it again") from None
