"""Data sets of TensorFlow Datasets, prepared as ArrayRecord files and read without TensorFlow.

`tfds:name`, `tfds:name/config` or `tfds:name/config:version` names one; without a version it is the newest that lies in
the data directory (`corpus.data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets). `corpus.split` picks a split or
a slice in TFDS's own words: `train`, `train[:10%]`, `train[100:200]+test`. Nothing is downloaded or prepared.

The record files of the split are the files of the source; a position is the number of an example in its file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bertgpt_jax.corpus.config import FIELD_SETTINGS
from bertgpt_jax.errors import ConfigError, DataError

PREFIX = "tfds:"
_EXAMPLES_AT_A_TIME = 256
_FORMAT = "array_record"


def find_examples(name: str, split: str, data_dir: str) -> list[Path]:
    """The record files that hold a split or slice of a data set, in order.

    Args:
        name: with its `tfds:`.

    Raises:
        ConfigError: the data set, its version, its split is unknown, or it is not prepared.
        DataError: it is prepared in another format, or a record file is missing.
    """
    paths = [path for path, _, _ in _instructions(_find_builder(name, data_dir), split, name)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{name}: {missing[0]} is missing ({len(missing)} of {len(paths)}); prepare the data set again")
    return list(dict.fromkeys(paths))


def cut_examples(path: str, split: str, target: int, fields: tuple[str, ...]) -> list[tuple[int, int, int]]:
    """The part of a record file that belongs to `split`, in pieces of about `target` bytes: (first, end, bytes).

    Raises:
        DataError: the file is damaged, or a feature of `fields` is missing or no text.
    """
    builder = _open_builder(Path(path))
    _check_features(path, builder.info.features, fields)
    found = sorted((lo, hi) for file, lo, hi in _instructions(builder, split, path) if file == Path(path))
    if any(a[1] > b[0] for a, b in zip(found, found[1:], strict=False)):
        raise ConfigError(f"corpus.split = '{split}' takes examples of {path} twice; every one may be given once")
    shard_split, number = _shard_of(builder, Path(path))
    length = builder.info.splits[shard_split].shard_lengths[number]
    _check_readable(path, builder, shard_split, number)
    each = Path(path).stat().st_size / max(1, length)
    step = max(1, int(target / each))
    cuts = [(a, min(a + step, hi)) for lo, hi in found for a in range(lo, hi, step)]
    return [(a, b, int((b - a) * each)) for a, b in cuts]


def read_examples(path: str, lo: int, hi: int, fields: tuple[str, ...]) -> Iterator[tuple[int, list[Any]]]:
    """(number, values of `fields` as bytes) of examples `[lo, hi)` of a record file.

    Raises:
        DataError: a feature is missing or no text, or a record is damaged.
    """
    from tensorflow_datasets import features as tfds_features

    builder = _open_builder(Path(path))
    known = builder.info.features
    _check_features(path, known, fields)
    wanted = tfds_features.FeaturesDict({name: known[name] for name in fields})  # the others are not decoded
    split, number = _shard_of(builder, Path(path))
    records = _records(builder, split, number, lo, hi)
    for start in range(0, hi - lo, _EXAMPLES_AT_A_TIME):
        batch = range(start, min(start + _EXAMPLES_AT_A_TIME, hi - lo))
        for i, record in zip(batch, _read(records, batch, path, lo), strict=True):
            row = wanted.deserialize_example_np(record)
            yield lo + i, [row[name] for name in fields]


def _check_features(path: str, known: Any, fields: tuple[str, ...]) -> None:
    from tensorflow_datasets import features as tfds_features

    for name, setting in zip(fields, FIELD_SETTINGS, strict=False):
        if name not in known:
            raise DataError(f"{path}: no feature '{name}'; features: {sorted(known)}; set {setting}")
        if not isinstance(known[name], tfds_features.Text):
            texts = sorted(n for n in known if isinstance(known[n], tfds_features.Text))
            kind = type(known[name]).__name__
            raise DataError(f"{path}: feature '{name}' is {kind}, not Text; features of text: {texts}")


def _read(records: Any, batch: range, path: str, first: int) -> list[bytes]:
    """The records of a batch of indices; record 0 is number `first` of its file."""
    found, reason = _try_read(records, batch)
    if reason is None:
        return found
    for i in batch:
        reason = _try_read(records, range(i, i + 1))[1] or ""
        if reason:
            raise DataError(f"{path}: record {first + i} is damaged ({reason}); fetch the file again")
    raise DataError(f"{path}: records {first + batch[0]} to {first + batch[-1]} cannot be read; fetch the file again")


def _try_read(records: Any, batch: range) -> tuple[list[bytes], str | None]:
    """Records, or why not. A file cut at a block's end gives empty ones without an error; no example is empty."""
    try:
        found = records.__getitems__(list(batch))
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        return [], _first_line(error) or "its end is missing"
    return found, None if all(found) else "its end is missing"


def _check_readable(path: str, builder: Any, split: str, number: int) -> None:
    """Reads a file's last record: a file that is empty, cut short or of another kind has none."""
    length = builder.info.splits[split].shard_lengths[number]
    reason = _try_read(_records(builder, split, number, length - 1, length), range(1))[1] if length else None
    if reason is not None:
        rule = f"no ArrayRecord file of {length:,} examples, or a damaged one"
        raise DataError(f"{path}: {Path(path).stat().st_size:,} bytes are {rule} ({reason}); fetch it again")


# ---------------------------------------------------------------- TFDS


def _find_builder(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    wanted = name.removeprefix(PREFIX)
    place = data_dir or str(tfds.core.constants.DATA_DIR)
    if "://" in place:
        raise ConfigError(f"corpus.data_dir = '{place}': only this machine's files are read; copy it here first")
    try:
        return builder_from_files(wanted, data_dir=str(Path(place).expanduser()))
    except tfds.core.DatasetNotFoundError:
        raise ConfigError(_why_not_found(wanted, Path(place).expanduser())) from None
    except ValueError as error:
        raise ConfigError(f"corpus.path = '{name}': {_first_line(error)}") from None


def _why_not_found(wanted: str, place: Path) -> str:
    """A known data set that is not prepared, or the nearest names of one that nobody knows."""
    import tensorflow_datasets as tfds

    base = wanted.partition(":")[0].partition("/")[0]
    prepared = sorted(_prepared(place))
    mine = [name for name in prepared if name.partition("/")[0].partition(":")[0] == base]
    if mine:
        return f"corpus.path = '{PREFIX}{wanted}': {place} holds {', '.join(mine[:5])}"
    with_checksums = (Path(tfds.__file__).parent / "url_checksums").glob(
        "*.txt"
    )  # those whose code needs TensorFlow too
    names = sorted({*tfds.list_builders(with_community_datasets=False), *(path.stem for path in with_checksums)})
    if base in names:
        return (
            f"corpus.path = '{PREFIX}{wanted}' is not prepared in {place} (corpus.data_dir); where there is a network: "
            f"pip install 'bertgpt_jax[tfds]' && tfds build {wanted} --file_format={_FORMAT} --data_dir={place}"
        )
    known = [*dict.fromkeys(name.partition("/")[0].partition(":")[0] for name in prepared), *names]
    close = difflib.get_close_matches(base, known, 3, 0.5)
    advice = f"did you mean {', '.join(close)}?" if close else f"prepared there: {', '.join(prepared[:5]) or 'nothing'}"
    return f"corpus.path = '{PREFIX}{wanted}': no data set of that name is known or lies in {place}; {advice}"


def _prepared(place: Path) -> Iterator[str]:
    """`name/config:version` of the data sets in a data directory."""
    for path in place.glob("*/**/features.json"):
        *name, version = path.parent.relative_to(place).parts
        yield f"{'/'.join(name)}:{version}"


def _open_builder(file: Path) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(file.parent)


def _instructions(builder: Any, split: str, name: str) -> list[tuple[Path, int, int]]:
    """(file, first, end) of the examples of a split, in order."""
    try:
        builder.as_data_source(split, file_format=_FORMAT)
    except NotImplementedError:
        kind = builder.info.file_format.value
        raise DataError(
            f"{name}: {builder.data_dir} is prepared as {kind}, which only TensorFlow reads; "
            f"prepare it with --file_format={_FORMAT}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"corpus.split = '{split}': {_first_line(error)}") from None
    found = builder.info.splits[split].file_instructions
    return [(Path(i.filename), i.skip, i.skip + i.take) for i in found if i.take]


def _shard_of(builder: Any, file: Path) -> tuple[str, int]:
    """The split a record file belongs to, and its number there."""
    for split, info in builder.info.splits.items():
        names = [Path(name).name for name in info.filenames]
        if file.name in names:
            return split, names.index(file.name)
    raise DataError(f"{file}: dataset_info.json beside it does not name it; prepare the data set again")


def _records(builder: Any, split: str, number: int, lo: int, hi: int) -> Any:
    """The serialised examples `[lo, hi)` of a record file, by random access."""
    import tensorflow_datasets as tfds

    first = sum(builder.info.splits[split].shard_lengths[:number])
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    wanted = f"{split}[{first + lo}:{first + hi}]"
    return builder.as_data_source(wanted, deserialize_method=raw, file_format=_FORMAT)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
