"""Parquet, Arrow and data sets saved to disk: rows, pieces, fields, splits, damage."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from bertgpt_jax.corpus.builder import prepare_corpus
from bertgpt_jax.corpus.cleaning import clean
from bertgpt_jax.corpus.config import CharactersConfig, CleaningConfig, CorpusConfig, FiltersConfig, HashSplit
from bertgpt_jax.corpus.cuts import cut_source
from bertgpt_jax.corpus.files import find_files
from bertgpt_jax.corpus.reader import CorpusReader
from bertgpt_jax.corpus.sources import RawDocument, read_documents
from bertgpt_jax.errors import ConfigError, DataError

TEXTS = [f"Row {i}.\n" + "word " * (i % 7) for i in range(100)]


def table(texts=TEXTS, kind=None) -> pa.Table:
    numbers = list(range(len(texts)))
    languages = [("en", "de", None)[i % 3] for i in numbers]
    return pa.table({"number": numbers, "text": pa.array(texts, kind or pa.string()), "language": languages})


def write(path: Path, rows: pa.Table, each: int, file_format: bool = False) -> Path:
    """A table in row groups or record batches of `each` rows."""
    if path.suffix == ".parquet":
        parquet.write_table(rows, path, row_group_size=each)
        return path
    new = pa.ipc.new_file if file_format else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, rows.schema) as writer:
        for batch in rows.to_batches(max_chunksize=each):
            writer.write_batch(batch)
    return path


def save_to_disk(directory: Path, texts: list[str], files: int) -> Path:
    """What `Dataset.save_to_disk` of Hugging Face `datasets` writes, as its version 5 does."""
    directory.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        write(directory / name, table(texts[len(texts) * i // files : len(texts) * (i + 1) // files]), 10)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_format_columns": None}
    (directory / "state.json").write_text(json.dumps(state | {"_split": None}))
    features = {"text": {"dtype": "string", "_type": "Value"}}
    (directory / "dataset_info.json").write_text(json.dumps({"features": features, "citation": ""}))
    return directory


def documents(settings: CorpusConfig, target: int = 1 << 30) -> list[RawDocument]:
    found = []
    language = settings.filters.language_field
    for file in find_files(settings):
        pieces = cut_source(file, target, settings)
        assert pieces[0][0] == 0 and all(a[1] == b[0] for a, b in zip(pieces, pieces[1:], strict=False))
        for lo, hi, _ in pieces:
            found += read_documents(file, lo, hi, settings.text_field, "", language)
    return found


def texts(found: list[RawDocument]) -> list[str]:
    return [d.text.decode() for d in found]


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather", "a.bin"])
def test_rows_are_documents_in_order(name, tmp_path):
    path = write(tmp_path / ("a.parquet" if name == "a.bin" else name), table(), 13, file_format=name == "a.feather")
    if name == "a.bin":
        path = path.rename(tmp_path / name)  # known by its first bytes
    found = documents(CorpusConfig(path=str(path)))
    assert texts(found) == TEXTS and [d.offset for d in found] == list(range(100))
    assert find_files(CorpusConfig(path=str(path)))[0].format == ("parquet" if name[2] in "pb" else "arrow")


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_every_type_of_text(kind, suffix, tmp_path):
    rows = table(["a", "ü", None, ""])
    rows = rows.set_column(
        1, "text", rows["text"].cast(kind) if kind != KINDS[-1] else rows["text"].dictionary_encode()
    )
    found = documents(CorpusConfig(path=str(write(tmp_path / f"a{suffix}", rows, 2))))
    assert texts(found) == ["a", "ü", "", ""]
    counts: Counter[str] = Counter()
    assert [clean(d, CleaningConfig(), counts) for d in found] == ["a", "ü", None, None] and counts["empty"] == 2


def test_bytes_that_are_no_text_are_cleaned_as_elsewhere(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"text": pa.array([b"caf\xe9"], pa.binary())}), 1)
    counts: Counter[str] = Counter()
    assert clean(documents(CorpusConfig(path=str(path)))[0], CleaningConfig(), counts) == "caf\ufffd"
    assert counts["invalid_utf8"] == 1


@given(
    lengths=st.lists(st.integers(0, 30), max_size=40),
    each=st.integers(1, 15),
    target=st.integers(1, 400),
    suffix=st.sampled_from([".parquet", ".arrow"]),
)
def test_pieces_neither_lose_nor_repeat_rows(tmp_path_factory, lengths, each, target, suffix):
    made = [f"{i}:" + "x" * n for i, n in enumerate(lengths)]
    path = write(tmp_path_factory.getbasetemp() / f"cut{suffix}", table(made), each)
    assert texts(documents(CorpusConfig(path=str(path)), target)) == made


def test_large_row_groups_are_cut(tmp_path):
    """Parquet files of one row group are common; several processes shall work on one."""
    path = write(tmp_path / "a.parquet", table(["some text of a row " * 50 + str(i) for i in range(3000)]), 3000)
    settings = CorpusConfig(path=str(path))
    file = find_files(settings)[0]
    whole = cut_source(file, 1 << 30, settings)
    pieces = cut_source(file, whole[0][2] // 4, settings)
    assert len(whole) == 1 and 4 <= len(pieces) <= 5 and sum(p[2] for p in pieces) >= whole[0][2]
    assert [d for lo, hi, _ in pieces for d in read_documents(file, lo, hi, "text", "")] == list(
        read_documents(file, 0, 3000, "text", "")
    )


# ---------------------------------------------------------------- data sets saved to disk


def test_a_saved_data_set(tmp_path):
    folder = save_to_disk(tmp_path / "saved", TEXTS, 3)
    write(folder / "cache-1234.arrow", table(["a leftover of map()"]), 1)
    files = find_files(CorpusConfig(path=str(folder)))
    assert [f.name for f in files] == [f"data-{i:05d}-of-00003.arrow" for i in range(3)]
    assert texts(documents(CorpusConfig(path=str(folder)))) == TEXTS


def test_the_splits_of_a_saved_dictionary(tmp_path):
    for name, lines in (("train", TEXTS[:60]), ("validation", TEXTS[60:])):
        save_to_disk(tmp_path / "saved" / name, lines, 1)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    path = str(tmp_path / "saved")
    assert texts(documents(CorpusConfig(path=path))) == TEXTS[:60]
    assert texts(documents(CorpusConfig(path=path, split="validation"))) == TEXTS[60:]
    with pytest.raises(ConfigError, match="corpus.split = 'test': .*saved has 'train', 'validation'"):
        find_files(CorpusConfig(path=path, split="test"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corpus_of_rows(workers, tmp_path):
    folder = save_to_disk(tmp_path / "saved", TEXTS, 3)
    settings = CorpusConfig(
        path=str(folder),
        shard_bytes=1000,
        sentences="line",
        shuffle_documents=False,
        held_out=HashSplit(fraction=0),
        tokenizer=CharactersConfig(),
        filters=FiltersConfig(language_field="language", languages=("en", "de")),
        workers=workers,
    )
    reader = CorpusReader(prepare_corpus(settings, tmp_path / "c", False))
    counts = reader.manifest["cleaning"]
    assert (counts["documents_read"], counts["language"], reader.manifest["totals"]["documents"]) == (100, 33, 67)
    origins = [reader.document_origin(s, i) for s, lo, hi in reader.split_documents("train") for i in range(lo, hi)]
    # 33 rows, 33 rows, 34 rows; each file's languages begin anew
    expected = [(f, i) for f, rows in enumerate((33, 33, 34)) for i in range(rows) if i % 3 != 2]
    assert origins == [(f"data-{f:05d}-of-00003.arrow", i) for f, i in expected]


# ---------------------------------------------------------------- what can be wrong


def text_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def halved(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def endless(path: Path) -> Path:
    """An Arrow stream without its end mark, as a writer leaves it that was killed between two batches."""
    path.write_bytes(path.read_bytes()[:-8])
    return path


def spoiled(path: Path) -> Path:
    """An Arrow file of which an offset points outside its text."""
    data = bytearray(path.read_bytes())
    at = data.index((9).to_bytes(4, "little") + (18).to_bytes(4, "little"))
    data[at + 4 : at + 8] = (1 << 30).to_bytes(4, "little")
    return text_file(path, bytes(data))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d: text_file(d / "a.parquet", b""), ["a.parquet", "no Parquet file"]),
        (lambda d: text_file(d / "a.arrow", b""), ["a.arrow", "0 bytes", "no end"]),
        (lambda d: text_file(d / "a.parquet", b"plain text"), ["a.parquet", "no Parquet file"]),
        (lambda d: text_file(d / "a.arrow", b"plain text" + bytes(4)), ["a.arrow", "no Arrow file"]),
        (lambda d: halved(write(d / "a.parquet", table(), 10)), ["a.parquet", "no Parquet file"]),
        (lambda d: halved(write(d / "a.arrow", table(), 10)), ["a.arrow"]),
        (lambda d: endless(write(d / "a.arrow", table(), 10)), ["a.arrow", "no end", "cut short"]),
        (lambda d: halved(write(d / "a.arrow", table(), 10, file_format=True)), ["a.arrow", "no Arrow file"]),
        (lambda d: spoiled(write(d / "a.arrow", table(["nine char"] * 9), 9)), ["a.arrow"]),
    ],
)
def test_damaged_tables_are_named(make, said, tmp_path):
    with pytest.raises(DataError) as caught:
        documents(CorpusConfig(path=str(make(tmp_path))))
    message = str(caught.value)
    assert "\n" not in message and [part for part in said if part not in message] == [], message


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_field": "body"}, ["no field 'body'", "['language', 'number', 'text']", "corpus.text_field"]),
        ({"text_field": "number"}, ["field 'number' is int64", "['text', 'language']"]),
        (
            {"filters": FiltersConfig(language_field="lang", languages=("en",))},
            ["no field 'lang'", "corpus.filters.language_field"],
        ),
    ],
)
def test_fields(suffix, changes, said, tmp_path):
    path = write(tmp_path / f"a{suffix}", table(), 10)
    with pytest.raises(DataError) as caught:
        documents(CorpusConfig(path=str(path), **changes))
    message = str(caught.value)
    assert str(path) in message and [part for part in said if part not in message] == [], message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d / "data-00001-of-00003.arrow").unlink(), "1 of 3 files of state.json are missing"),
        (lambda d: (d / "state.json").write_text("{"), "state.json: damaged"),
        (lambda d: (d / "state.json").write_text("{}"), "no list '_data_files'"),
        (
            lambda d: (d / "state.json").write_text('{"_indices_data_files": [{"filename": "i.arrow"}]}'),
            "flatten_indices",
        ),
        (lambda d: (d / "state.json").write_text('{"_data_files": [{"filename": "../../x"}]}'), "missing"),
    ],
)
def test_damaged_data_sets_are_named(change, said, tmp_path):
    folder = save_to_disk(tmp_path / "saved", TEXTS, 3)
    change(folder)
    with pytest.raises(DataError, match=said):
        find_files(CorpusConfig(path=str(folder)))


def test_text_is_not_taken_for_a_table(tmp_path):
    path = write(tmp_path / "a.parquet", table(), 10)
    with pytest.raises(DataError, match="this is parquet, not UTF-8 text"):
        find_files(CorpusConfig(path=str(path), format="text"))
    os.rename(path, tmp_path / "a.txt")
    assert find_files(CorpusConfig(path=str(tmp_path / "a.txt")))[0].format == "parquet"
