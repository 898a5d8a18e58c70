"""TFDS data sets: names, splits and slices, pieces, features, damage. The data set is built by `tfds_data_dir`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bertgpt_jax.corpus.builder import prepare_corpus
from bertgpt_jax.corpus.config import CharactersConfig, CorpusConfig, FiltersConfig, HashSplit
from bertgpt_jax.corpus.cuts import cut_source
from bertgpt_jax.corpus.files import find_files
from bertgpt_jax.corpus.reader import CorpusReader
from bertgpt_jax.corpus.sources import read_documents
from bertgpt_jax.errors import ConfigError, DataError

VERSION = Path("made_up") / "plain" / "1.0.0"


def config(data_dir: Path, **changes) -> CorpusConfig:
    base = {"path": "tfds:made_up/plain:1.0.0", "data_dir": str(data_dir)}
    return CorpusConfig(**(base | changes))


def numbers(settings: CorpusConfig, target: int = 1 << 30) -> list[int]:
    """The numbers of the examples of a source, in order, read in pieces of `target` bytes."""
    found = []
    for file in find_files(settings):
        for lo, hi, _ in cut_source(file, target, settings):
            for raw in read_documents(file, lo, hi, "text", ""):
                assert raw.text.endswith(b".\nIts second line.") and lo <= raw.offset < hi
                found.append(int(raw.text.split(b".")[0].split()[-1]))
    return found


@pytest.fixture(scope="module")
def stored(tfds_data_dir) -> list[int]:
    """The order in which TFDS stored the train split."""
    return numbers(config(tfds_data_dir))


def test_a_split_is_read_whole_and_once(tfds_data_dir, stored):
    assert sorted(stored) == list(range(100)) and stored != sorted(stored)
    files = find_files(config(tfds_data_dir))
    assert [f.name for f in files] == [f"made_up-train.array_record-{i:05d}-of-00004" for i in range(4)]
    assert all(f.format == "tfds" and f.size == Path(f.path).stat().st_size for f in files)


@pytest.mark.parametrize("name", ["tfds:made_up", "tfds:made_up/plain", "tfds:made_up/plain:1.*.*"])
def test_the_version_may_be_left_out(name, tfds_data_dir, stored):
    assert numbers(config(tfds_data_dir, path=name)) == stored


def test_the_environment_names_the_data_directory(tfds_data_dir):
    program = "from bertgpt_jax.corpus.files import find_files; from bertgpt_jax.corpus.config import CorpusConfig\n"
    program += "import sys; print(len(find_files(CorpusConfig(path='tfds:made_up'))))\n"
    program += "print({'tensorflow', 'jax', 'grain'} & set(sys.modules))"
    environment = {"TFDS_DATA_DIR": str(tfds_data_dir), "PATH": "", "HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["4", "set()"]


@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        ("train[:10%]", slice(0, 10)),
        ("train[30:60]", slice(30, 60)),
        ("train[-5:]", slice(95, 100)),
        ("train[25:50]", slice(25, 50)),
    ],
)
def test_slices(split, wanted, tfds_data_dir, stored):
    assert numbers(config(tfds_data_dir, split=split)) == stored[wanted]


def test_splits_are_added(tfds_data_dir, stored):
    found = numbers(config(tfds_data_dir, split="train[:3]+test+train[20:30]"))
    assert set(found) == {*stored[:3], *range(100, 110), *stored[20:30]} and len(found) == 23


@pytest.mark.parametrize("target", [7000, 20_000, pytest.param(1, marks=pytest.mark.slow)])
def test_pieces_neither_lose_nor_repeat_examples(target, tfds_data_dir, stored):
    assert numbers(config(tfds_data_dir), target) == stored
    assert numbers(config(tfds_data_dir, split="train[13:77]"), target) == stored[13:77]


def test_a_corpus_of_examples(tfds_data_dir, tmp_path, stored):
    """Processes and restarts included: two workers over many shards make the store that one process makes."""
    settings = config(
        tfds_data_dir,
        split="train[:60]",
        shard_bytes=100_000,
        sentences="line",
        shuffle_documents=False,
        held_out=HashSplit(fraction=0),
        tokenizer=CharactersConfig(),
        filters=FiltersConfig(language_field="language", languages=("en",)),
        workers=2,
    )
    reader = CorpusReader(prepare_corpus(settings, tmp_path / "two", False))
    assert reader.num_shards > 1 and reader.manifest["cleaning"]["language"] > 10
    found = []
    for shard, lo, hi in reader.split_documents("train"):
        for i in range(lo, hi):
            starts, ends = reader.document_spans(shard, i, i + 1)
            text = reader.tokenizer.decode(reader.gather(starts, ends - starts))
            name, offset = reader.document_origin(shard, i)
            number = int(text.split(".")[0].split()[-1])
            assert stored[int(name.split("-")[2]) * 25 + offset] == number
            found.append(number)
    assert found == [n for n in stored[:60] if n % 2 == 0]
    alone = CorpusConfig(**(settings.model_dump() | {"workers": 0}))
    assert CorpusReader(prepare_corpus(alone, tmp_path / "one", False)).fingerprint == reader.fingerprint


# ---------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": "tfds:made_op"}, ["'tfds:made_op'", "no data set of that name", "did you mean made_up"]),
        ({"path": "tfds:mnits"}, ["did you mean", "mnist"]),
        ({"path": "tfds:mnist"}, ["'tfds:mnist' is not prepared in", "tfds build mnist", "bertgpt_jax[tfds]"]),
        ({"path": "tfds:made_up/other"}, ["'tfds:made_up/other'", "holds made_up/plain:1.0.0"]),
        ({"path": "tfds:made_up/plain:2.0.0"}, ["holds made_up/plain:1.0.0"]),
        ({"path": "tfds:"}, ["'tfds:'"]),
        ({"split": "trian"}, ["corpus.split = 'trian'", "['train', 'test']"]),
        ({"split": "train[:x]"}, ["corpus.split = 'train[:x]'"]),
        ({"split": "train[:60%]+train[40%:]"}, ["train.array_record-00001", "twice"]),
        ({"path": "/tmp", "format": "tfds"}, ["corpus.format = 'tfds'", "'tfds:NAME'"]),
    ],
)
def test_names_and_splits(changes, said, tfds_data_dir):
    with pytest.raises(ConfigError) as caught:
        numbers(config(tfds_data_dir, **changes))
    message = str(caught.value)
    assert "\n" not in message and [part for part in said if part not in message] == [], message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text_field": "body"}, ["no feature 'body'", "['language', 'number', 'text']", "corpus.text_field"]),
        ({"text_field": "number"}, ["'number' is Scalar", "['language', 'text']"]),
        (
            {"filters": FiltersConfig(language_field="lang", languages=("en",))},
            ["no feature 'lang'", "corpus.filters.language_field"],
        ),
    ],
)
def test_features(fields, said, tfds_data_dir):
    settings = config(tfds_data_dir, **fields)
    with pytest.raises(DataError) as caught:
        cut_source(find_files(settings)[0], 1000, settings)
    assert [part for part in said if part not in str(caught.value)] == [], caught.value


def damaged(tfds_data_dir: Path, tmp_path: Path, change) -> CorpusConfig:
    """A copy of the data set, its second train file's bytes changed."""
    shutil.copytree(tfds_data_dir, tmp_path / "data")
    file = tmp_path / "data" / VERSION / "made_up-train.array_record-00001-of-00004"
    data = change(bytearray(file.read_bytes()))
    file.write_bytes(data) if data is not None else file.unlink()
    return config(tmp_path / "data")


def flipped(data: bytearray) -> bytearray:
    """One bit of the first record's chunk changed; the file's end, with its index, stays."""
    data[200] ^= 1
    return data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: b"", ["0 bytes", "no ArrayRecord file of 25 examples"]),
        (lambda data: data[: len(data) // 2], ["65,536 bytes", "of 25 examples", "its end is missing"]),
        (lambda data: data[:-1], ["131,071 bytes", "no ArrayRecord file of 25 examples"]),
        (lambda data: b"plain text\n" * 20_000, ["no ArrayRecord file of 25 examples"]),
        (flipped, ["record 0 is damaged"]),
        (lambda data: None, ["is missing (1 of 4)"]),
    ],
)
def test_damaged_files_are_named(change, said, tfds_data_dir, tmp_path):
    settings = damaged(tfds_data_dir, tmp_path, change)
    with pytest.raises(DataError, match="train.array_record-00001-of-00004") as caught:
        numbers(settings)
    message = str(caught.value)
    assert "\n" not in message and [part for part in said if part not in message] == [], message


def test_a_data_set_in_another_format(tfds_data_dir, tmp_path):
    shutil.copytree(tfds_data_dir, tmp_path / "data")
    info = tmp_path / "data" / VERSION / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for file in info.parent.glob("*.array_record-*"):
        file.rename(file.with_name(file.name.replace("array_record", "tfrecord")))
    with pytest.raises(DataError, match="prepared as tfrecord.*--file_format=array_record"):
        find_files(config(tmp_path / "data"))
