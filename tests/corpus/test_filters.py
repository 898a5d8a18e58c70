"""Filters: length, language, documents that repeat; and sources that change while they are read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgpt_jax.config import fingerprint, identity
from bertgpt_jax.corpus import builder, duplicates
from bertgpt_jax.corpus.builder import prepare_corpus
from bertgpt_jax.corpus.config import CharactersConfig, CleaningConfig, CorpusConfig, FiltersConfig, HashSplit
from bertgpt_jax.corpus.files import check_unchanged, find_files
from bertgpt_jax.corpus.plan import find_request, make_plan
from bertgpt_jax.corpus.reader import CorpusReader
from bertgpt_jax.corpus.shards import shard_documents
from bertgpt_jax.errors import ConfigError, DataError

DROP = FiltersConfig(duplicates="drop")


def config(path, **changes) -> CorpusConfig:
    base = {
        "path": str(path),
        "sentences": "line",
        "shard_bytes": 1000,
        "workers": 0,
        "shuffle_documents": False,
        "held_out": HashSplit(fraction=0),
        "tokenizer": CharactersConfig(),
    }
    return CorpusConfig(**(base | changes))


def kept(wanted: CorpusConfig, out: Path) -> tuple[list[str], dict[str, int]]:
    """Texts of a corpus made of a source, in order, and what the report counts."""
    reader = CorpusReader(prepare_corpus(wanted, out, False))
    found = []
    for shard, lo, hi in reader.split_documents("train"):
        starts, ends = reader.document_spans(shard, lo, hi)
        found += [
            reader.tokenizer.decode(reader.gather(starts[i : i + 1], ends[i : i + 1] - starts[i]))
            for i in range(hi - lo)
        ]
    return found, reader.manifest["cleaning"]


def tree(out: Path) -> dict[str, str]:
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name != "plan.json"]
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_corpora_without_filters_keep_their_name():
    """The identity of a config as it was before there were filters and splits; corpora are found again by it."""
    earlier = "5ab03b5e396600ed943a5a07e9c7170e931cc45ed52fd30aa726c19b9ac262e7"
    assert fingerprint(identity(CorpusConfig())) == earlier
    assert fingerprint(identity(CorpusConfig(filters=FiltersConfig(), split="train", data_dir="x"))) == earlier
    assert fingerprint(identity(CorpusConfig(filters=DROP))) != earlier


def test_length_and_language(tmp_path):
    rows = [("a" * n, ("en", "de", "", None)[n % 4]) for n in range(1, 21)]
    lines = [json.dumps({"text": text, "lang": language}) for text, language in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    filters = FiltersConfig(max_characters=15, language_field="lang", languages=("en", "de"))
    wanted = config(tmp_path / "rows.jsonl", filters=filters, cleaning=CleaningConfig(min_characters=5))
    found, counts = kept(wanted, tmp_path / "c")
    assert found == ["a" * n for n in (5, 8, 9, 12, 13)]
    assert counts == {
        **{"documents_read": 20, "language": 10, "min_characters": 2, "max_characters": 3},
        **{"language=en": 2, "language=de": 3},
    }


def test_the_report_names_what_was_dropped(tmp_path):
    (tmp_path / "a.txt").write_text("once\n\nonce\n\n" + "long " * 9)
    said: list[str] = []
    filters = FiltersConfig(max_characters=20, duplicates="drop")
    prepare_corpus(config(tmp_path / "a.txt", filters=filters), tmp_path / "c", said.append)
    assert any(line.startswith("duplicates: looked for") for line in said)
    assert any("dropped    max_characters 1, duplicates 1" in line for line in said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"language_field": "lang"}, "language_field 'lang' and languages \\[\\] go together"),
        ({"languages": ("en",)}, "language_field '' and languages \\['en'\\] go together"),
        ({"max_characters": 0}, "greater than or equal to 1"),
    ],
)
def test_filters_that_contradict_themselves(changes, said):
    with pytest.raises(ValueError, match=said):
        FiltersConfig(**changes)


def test_a_language_needs_fields(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    filters = FiltersConfig(language_field="lang", languages=("en",))
    with pytest.raises(ConfigError, match="language_field = 'lang': .*a.txt is text and has no fields"):
        find_files(config(tmp_path / "a.txt", filters=filters))
    with pytest.raises(ValueError, match="max_characters 5 is below cleaning.min_characters 6"):
        config("x", filters=FiltersConfig(max_characters=5), cleaning=CleaningConfig(min_characters=6))


# ---------------------------------------------------------------- duplicates


def write_repeating(folder: Path, documents: int = 300, distinct: int = 100) -> list[str]:
    """Three files of documents drawn with repeats; all texts in order."""
    folder.mkdir()
    draw = random.Random(0)
    texts = [f"Document {draw.randrange(distinct)} of few.\n" + "It is short." for _ in range(documents)]
    for i in range(3):
        (folder / f"{i}.txt").write_text("\n\n".join(texts[documents * i // 3 : documents * (i + 1) // 3]))
    return texts


@pytest.fixture(scope="module")
def repeating(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("repeating") / "text"
    return folder, write_repeating(folder)


@pytest.mark.parametrize(
    "changes", [{}, {"workers": 2}, {"shard_bytes": 4000}, {"shard_bytes": 10**6}], ids=["1", "workers", "4k", "one"]
)
def test_the_first_of_equal_documents_stays(changes, repeating, tmp_path):
    folder, texts = repeating
    found, counts = kept(config(folder, filters=DROP, **changes), tmp_path / "c")
    assert found == list(dict.fromkeys(texts))
    assert counts == {"documents_read": 300, "duplicates": 300 - len(found)}
    assert not list((tmp_path / "c").glob(".*"))


def test_equal_after_cleaning_is_equal(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("a\r\nb", "a\nb", "a b", "A\nb")))
    assert kept(config(tmp_path / "rows.jsonl", filters=DROP), tmp_path / "c")[0] == ["a\nb", "a b", "A\nb"]


def test_what_other_filters_drop_repeats_nothing(tmp_path):
    """The first of two equal documents is in the wrong language: the second stays."""
    rows = [{"text": "x", "lang": "de"}, {"text": "x", "lang": "en"}, {"text": "x", "lang": "en"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    filters = FiltersConfig(language_field="lang", languages=("en",), duplicates="drop")
    found, counts = kept(config(tmp_path / "rows.jsonl", filters=filters), tmp_path / "c")
    assert found == ["x"] and counts == {"documents_read": 3, "language": 1, "duplicates": 1, "language=en": 1}


@settings(max_examples=40)
@given(texts=st.lists(st.sampled_from("abcdefghij"), max_size=40), range_bytes=st.sampled_from([1, 100, 1 << 20]))
def test_any_repeats_in_any_number_of_ranges(tmp_path_factory, texts, range_bytes):
    """The hash space is looked at in up to 1,024 ranges; shards are of one to three documents."""
    root = tmp_path_factory.mktemp("any")
    (root / "a.jsonl").write_text("\n".join(json.dumps({"text": t * 400}) for t in texts) or "\n")
    wanted = config(root / "a.jsonl", filters=DROP)
    plan = make_plan(wanted, *find_request(wanted))
    plan = dataclasses.replace(plan, duplicates=str(root / duplicates.DUPLICATES))
    (root / duplicates.HASHES).mkdir()
    for index in range(len(plan.shards)):
        duplicates.hash_shard(plan, index, root)
    duplicates.find_duplicates(plan, root, range_bytes)
    counts = Counter()
    found = [d.text[0] for i in range(len(plan.shards)) for d in shard_documents(plan, i, counts)]
    assert found == list(dict.fromkeys(texts)) and counts["duplicates"] == len(texts) - len(found)


@pytest.fixture(scope="module")
def undisturbed(repeating, tmp_path_factory) -> dict[str, str]:
    """The files of a build that nothing happened to, but for its plan, which has paths."""
    out = prepare_corpus(config(repeating[0], filters=DROP), tmp_path_factory.mktemp("whole") / "c", False)
    return tree(out)


class Killed(BaseException):
    """What a kill does to a function."""


@pytest.mark.parametrize(
    ("module", "name", "after"),
    [
        (duplicates, "hash_shard", 0),
        (duplicates, "hash_shard", 3),
        (duplicates, "find_duplicates", 0),
        (duplicates, "_later_ones", 0),
        (builder, "_ensure_tokenizer", 0),
        (builder, "tokenise_shard", 0),
        (builder, "tokenise_shard", 3),
        (builder, "remove_duplicates", 0),
        (builder, "_manifest", 0),
    ],
)
def test_killed_anywhere_and_started_again(module, name, after, repeating, undisturbed, tmp_path, monkeypatch):
    """The same store, byte for byte; nothing that is finished is done again."""
    folder, _ = repeating
    wanted = config(folder, filters=DROP)
    real, calls = getattr(module, name), []

    def killed(*arguments):
        if len(calls) == after:
            raise Killed
        calls.append(None)
        return real(*arguments)

    monkeypatch.setattr(module, name, killed)
    with pytest.raises(Killed):
        prepare_corpus(wanted, tmp_path / "c", False)
    monkeypatch.undo()
    hashed: list[int] = []
    real_hash = duplicates.hash_shard
    monkeypatch.setattr(duplicates, "hash_shard", lambda p, i, out: (hashed.append(i), real_hash(p, i, out)))
    prepare_corpus(wanted, tmp_path / "c", False)
    shards = CorpusReader(tmp_path / "c").num_shards
    assert shards > 6 and len(hashed) == (shards - after if name == "hash_shard" else 0)
    assert tree(tmp_path / "c") == undisturbed


# ---------------------------------------------------------------- sources that change


def write_story(path: Path, documents: int = 200) -> Path:
    path.write_text("\n\n".join(f"Document {i}." for i in range(documents)))
    return path


SLOW = pytest.param("_manifest", 2, marks=pytest.mark.slow)


def longer(path: Path) -> None:
    path.write_text(path.read_text() + "\n\nOne more.")


def edited(path: Path) -> None:
    """As many bytes, and even the time of the last write is put back."""
    status = path.stat()
    path.write_text(path.read_text().replace("Document 7.", "Dokument 7."))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [(longer, "it had 2,888 bytes and has 2,899"), (edited, "changed while"), (Path.unlink, "No such file")],
)
@pytest.mark.parametrize(("stage", "workers"), [("_ensure_tokenizer", 0), ("_manifest", 0), SLOW])
def test_a_source_that_changes_is_named(stage, workers, change, said, tmp_path, monkeypatch):
    """Between planning and tokenising; between tokenising and the end."""
    path = write_story(tmp_path / "a.txt")
    real = getattr(builder, stage)

    def changing(*arguments):
        value = real(*arguments)
        change(path)
        return value

    monkeypatch.setattr(builder, stage, changing)
    with pytest.raises(ValueError, match=said) as caught:
        prepare_corpus(config(path, workers=workers), tmp_path / "c", False)
    assert "a.txt" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_a_source_that_is_cut_while_it_is_read(tmp_path):
    """What looks like damage is said to be the change it is."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": "x" * 100}) for _ in range(50)))
    plan = make_plan(config(path), *find_request(config(path)))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match="rows.jsonl changed while it was read"):
        list(shard_documents(plan, len(plan.shards) - 1, Counter()))


def test_a_source_that_is_touched_is_the_same(tmp_path):
    path = write_story(tmp_path / "a.txt")
    file = find_files(config(path))[0]
    os.utime(path, ns=(1, 1))
    check_unchanged(file)
    shutil.copy(path, tmp_path / "b.txt")
    os.replace(tmp_path / "b.txt", path)
    check_unchanged(file)
