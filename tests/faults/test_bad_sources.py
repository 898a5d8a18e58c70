"""What can be wrong with the data that a source names: one line with the thing and the value, the documented exit code.

As in test_bad_input.py, the number of a row is that of the project's list of bad inputs; 0 is a row of its own.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from bertgpt_jax.commands import prepare, tokenizer, train
from bertgpt_jax.corpus import builder
from bertgpt_jax.training import setup

TINY = str(Path(__file__).parent / "tiny.py")
DATA, STORAGE, CONFIG = 65, 74, 78
TRAIN_FILE = "made_up-train.array_record-00002-of-00004"

# (row, command, arguments, exit code, what the line must hold). @ is the directory of the files made below.
# `train` is of tiny.py; `prepare` writes to a new directory.
ROWS = [
    (31, "train", ["corpus.path=tfds:made_op"], CONFIG, ["corpus.path = 'tfds:made_op'", "did you mean made_up"]),
    (31, "train", ["corpus.path=tfds:wikipedai"], CONFIG, ["'tfds:wikipedai'", "did you mean", "wikipedia"]),
    (31, "prepare", ["tfds:made_up/fancy"], CONFIG, ["'tfds:made_up/fancy'", "holds made_up/plain:1.0.0"]),
    (31, "prepare", ["tfds:made_up/plain:3.0.0"], CONFIG, ["'tfds:made_up/plain:3.0.0'", "plain:1.0.0"]),
    (31, "prepare", ["tfds:"], CONFIG, ["'tfds:'"]),
    (32, "train", ["corpus.path=tfds:wikipedia/20230601.en"], CONFIG,
     ["not prepared in", "tfds build wikipedia/20230601.en --file_format=array_record", "bertgpt_jax[tfds]"]),
    (32, "train", ["corpus.path=tfds:mnist", "corpus.data_dir=@/none"], CONFIG, ["/none (corpus.data_dir)"]),
    (32, "prepare", ["tfds:made_up", "data_dir=gs://bucket/tfds"], CONFIG, ["data_dir = 'gs://bucket/tfds'", "copy"]),
    (33, "train", ["corpus.path=tfds:made_up", "corpus.split=trian"], CONFIG,
     ["corpus.split = 'trian'", "['train', 'test']"]),
    (33, "prepare", ["tfds:made_up", "split=train[:x%]"], CONFIG, ["corpus.split = 'train[:x%]'"]),
    (33, "prepare", ["@/dictionary", "split=test"], CONFIG, ["corpus.split = 'test'", "dictionary has 'train', 'dev'"]),
    (33, "prepare", ["@/text.txt", "split=test"], CONFIG, ["corpus.split = 'test'", "text.txt is text", "no splits"]),
    (34, "train", ["corpus.path=tfds:made_up", "corpus.text_field=body"], DATA,
     ["no feature 'body'", "['language', 'number', 'text']", "corpus.text_field"]),
    (34, "train", ["corpus.path=tfds:made_up", "corpus.text_field=number"], DATA,
     ["feature 'number' is Scalar", "['language', 'text']"]),
    (34, "train", ["corpus.path=@/table.parquet", "corpus.text_field=body"], DATA,
     ["table.parquet", "no field 'body'", "['number', 'text']"]),
    (34, "prepare", ["@/table.arrow", "text_field=number"], DATA, ["table.arrow", "'number' is int64", "['text']"]),
    (34, "prepare", ["@/rows.jsonl", "filters.language_field=lang", 'filters.languages=["en"]'], DATA,
     ["rows.jsonl:2", "no field 'lang'", "corpus.filters.language_field"]),
    (36, "prepare", ["tfds:made_up", "data_dir=@/missing"], DATA, [TRAIN_FILE, "missing (1 of 4)"]),
    (36, "prepare", ["@/dictionary/dev"], DATA, ["dictionary/dev", "1 of 2 files of state.json are missing"]),
    (37, "train", ["corpus.path=tfds:made_up", "corpus.data_dir=@/empty"], DATA,
     [TRAIN_FILE, "0 bytes are no ArrayRecord file of 25 examples", "64KB"]),
    (37, "prepare", ["@/empty.parquet"], DATA, ["empty.parquet", "no Parquet file"]),
    (37, "prepare", ["@/empty.arrow"], DATA, ["empty.arrow", "0 bytes"]),
    (38, "train", ["corpus.path=tfds:made_up", "corpus.data_dir=@/truncated"], DATA,
     [TRAIN_FILE, "131,000 bytes", "25 examples"]),
    (38, "prepare", ["tfds:made_up", "data_dir=@/halved"], DATA, [TRAIN_FILE, "65,536 bytes", "its end is missing"]),
    (38, "train", ["corpus.path=@/truncated.parquet"], DATA, ["truncated.parquet", "damaged"]),
    (38, "prepare", ["@/truncated.arrow"], DATA, ["truncated.arrow", "cut short"]),
    (39, "train", ["corpus.path=tfds:made_up", "corpus.data_dir=@/flipped"], DATA,
     [TRAIN_FILE, "record 0 is damaged", "hash mismatch"]),
    (40, "prepare", ["tfds:made_up", "data_dir=@/tfrecord"], DATA, ["tfrecord", "--file_format=array_record"]),
    (40, "prepare", ["@/some.array_record"], DATA, ["some.array_record", ".array_record is not read", "tfds:NAME"]),
    (40, "prepare", ["@/some.tfrecord"], DATA, ["some.tfrecord", ".tfrecord is not read"]),
    (40, "prepare", ["@/text.parquet"], DATA, ["text.parquet", "no Parquet file"]),
    (40, "prepare", ["@/text.txt", "format=arrow"], DATA, ["text.txt", "Arrow"]),
    (40, "prepare", ["@/table.parquet", "format=text"], DATA, ["table.parquet", "this is parquet, not UTF-8 text"]),
    (40, "prepare", ["@/text.txt", "format=tfds"], CONFIG, ["corpus.format = 'tfds'", "text.txt", "tfds:NAME"]),
    (42, "prepare", ["tfds:made_up", "split=train[:60%]+train[40%:]"], CONFIG, ["corpus.split", "40%:]", "twice"]),
    (42, "prepare", ["tfds:made_up", "tfds:made_up/plain"], DATA, ["made_up-train.array_record-00000", "twice"]),
    (44, "train", ["corpus.path=@/table.parquet", "corpus.filters.max_characters=3"], DATA,
     ["table.parquet", "no document is left of 40", "max_characters 40"]),
    (44, "prepare", ["tfds:made_up", "filters.language_field=language", 'filters.languages=["fr"]'], DATA,
     ["no document is left of 100", "language 100"]),
    (0, "train", ["corpus.path=-"], DATA, ["corpus.path = '-'", "standard input is empty"]),
    (0, "prepare", ["-"], DATA, ["corpus.path = '-'", "standard input is empty"]),
    (0, "prepare", ["-", "@/text.txt"], CONFIG, ["'-' stands alone"]),
    (0, "tokenizer", ["train", "-"], CONFIG, ["'-' stands alone", "prepare and train"]),
    (0, "train", ["corpus.path=@/text.txt", 'corpus.filters.languages=["en"]'], CONFIG,
     ["corpus.filters", "language_field ''", "['en']", "set both"]),
    (0, "prepare", ["@/text.txt", "filters.language_field=lang", 'filters.languages=["en"]'], CONFIG,
     ["corpus.filters.language_field = 'lang'", "text.txt is text", "no fields"]),
    (0, "prepare", ["@/text.txt", "filters.max_characters=0"], CONFIG, ["filters.max_characters = '0'"]),
    (0, "prepare", ["@/text.txt", "filters.max_characters=5", "cleaning.min_characters=9"], CONFIG,
     ["filters.max_characters 5", "cleaning.min_characters 9"]),
    (0, "prepare", ["@/text.txt", "filters.duplicates=yes"], CONFIG, ["filters.duplicates = 'yes'", "'drop'"]),
]  # fmt: skip

COMMANDS = {"train": train, "prepare": prepare, "tokenizer": tokenizer}


def write_tables(root: Path) -> None:
    texts = [f"This is row {i}.\nIt has two sentences." for i in range(40)]
    table = pa.table({"number": list(range(40)), "text": texts})
    parquet.write_table(table, root / "table.parquet")
    with pa.OSFile(str(root / "table.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for suffix in ("parquet", "arrow"):
        (root / f"empty.{suffix}").write_bytes(b"")
        (root / f"truncated.{suffix}").write_bytes((root / f"table.{suffix}").read_bytes()[:-100])
    for name in ("text.txt", "text.parquet", "some.array_record", "some.tfrecord"):
        (root / name).write_text("\n\n".join(texts))
    (root / "rows.jsonl").write_text('{"text": "a", "lang": "en"}\n{"text": "b"}\n')
    for split in ("train", "dev"):
        folder = root / "dictionary" / split
        folder.mkdir(parents=True)
        names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
        shutil.copy(root / "table.arrow", folder / names[0])
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        (folder / "dataset_info.json").write_text("{}")
    (root / "dictionary" / "dataset_dict.json").write_text('{"splits": ["train", "dev"]}')


def write_examples(root: Path, tfds_data_dir: Path) -> None:
    """Copies of a TFDS data directory, each with one thing wrong."""

    def spoiled(name: str, change) -> None:
        file = shutil.copytree(tfds_data_dir, root / name) / "made_up" / "plain" / "1.0.0" / TRAIN_FILE
        data = change(bytearray(file.read_bytes()))
        file.unlink() if data is None else file.write_bytes(data)

    def flip(data: bytearray) -> bytearray:
        data[200] ^= 1
        return data

    spoiled("missing", lambda data: None)
    spoiled("empty", lambda data: b"")
    spoiled("truncated", lambda data: data[:131_000])
    spoiled("halved", lambda data: data[:65_536])
    spoiled("flipped", flip)
    spoiled("tfrecord", lambda data: data)
    info = root / "tfrecord" / "made_up" / "plain" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for file in info.parent.glob("*.array_record-*"):
        file.rename(file.with_name(file.name.replace("array_record", "tfrecord")))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tfds_data_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("files")
    write_tables(root)
    write_examples(root, tfds_data_dir)
    return root


@pytest.fixture
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lower_train_step", "lower_eval_step"):
        monkeypatch.setattr(setup, name, lambda *_: pytest.fail("the bad input was found too late: compiling"))


def argv_of(command: str, arguments: list[str], files: Path, data_dir: Path, out: Path) -> list[str]:
    filled = [argument.replace("@", str(files)) for argument in arguments]
    if command == "train":
        return [TINY, f"corpus.data_dir={data_dir}", *filled, "--workdir", str(out)]
    if command == "tokenizer":
        return [*filled, "--out", str(out)]
    settings = ["tokenizer.vocab_size=256", "sentences=line", "workers=0", f"data_dir={data_dir}"]
    return [*settings, *filled, "--out", str(out), "--quiet"]


def error_line(err: str) -> str:
    assert "Traceback" not in err
    lines = err.rstrip("\n").split("\n")
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
    return lines[-1]


@pytest.mark.parametrize(
    ("command", "arguments", "code", "said"),
    [pytest.param(*row[1:], id=f"{row[0]}-{i}-{row[2][-1]}"[:60]) for i, row in enumerate(ROWS)],
)
def test_bad_source(command, arguments, code, said, files, tfds_data_dir, no_compile, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    out = tmp_path / "runs" / "out"
    out.parent.mkdir()
    found = COMMANDS[command].main(argv_of(command, arguments, files, tfds_data_dir, out))
    line = error_line(capsys.readouterr().err)
    assert (found, [part for part in said if part not in line]) == (code, []), line
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (lambda path: path.write_text("Something else."), DATA, "changed while it was read (it had "),
        (Path.unlink, STORAGE, "cannot be read (No such file or directory)"),
    ],
)
def test_a_source_that_changes_while_it_is_read(change, code, said, monkeypatch, no_compile, capsys, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"This is document {i}.\nIt has two sentences." for i in range(300)))
    real = builder._ensure_tokenizer
    monkeypatch.setattr(builder, "_ensure_tokenizer", lambda *a: (real(*a), change(path))[0])
    workdir = tmp_path / "runs" / "run"
    settings = [f"corpus.path={path}", "corpus.tokenizer.kind=characters", "--workdir", str(workdir)]
    assert train.main([TINY, *settings]) == code
    line = error_line(capsys.readouterr().err)
    assert str(path) in line and said in line
    assert not workdir.exists()
