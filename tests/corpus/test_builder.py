"""Building and reading corpora: contents, splits, restarts, caches, damage."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgpt_jax.config import apply_overrides
from bertgpt_jax.corpus.builder import _PARTS, open_corpus, prepare_corpus
from bertgpt_jax.corpus.config import (
    ByteBPEConfig,
    CharactersConfig,
    CorpusConfig,
    HashSplit,
    PositionSplit,
    WordPieceConfig,
)
from bertgpt_jax.corpus.places import remove_named
from bertgpt_jax.corpus.reader import CorpusReader, InMemoryCorpus
from bertgpt_jax.errors import ConfigError, DataError

WORDS = "one two three four five six seven eight nine ten the a of in is was it for on with he as you do at".split()


def story(number: int) -> str:
    rng = np.random.default_rng(number)
    lines = [" ".join(rng.choice(WORDS, rng.integers(4, 12))).capitalize() + "." for _ in range(rng.integers(1, 9))]
    return f"Story number {number}.\n" + "\n".join(lines)


def write_stories(folder: Path, files: int, each: int) -> Path:
    folder.mkdir(parents=True)
    for f in range(files):
        text = "\n\n".join(story(f * each + i) for i in range(each)) + "\n"
        if f % 2:
            (folder / f"{f}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        else:
            (folder / f"{f}.txt").write_text(text)
    return folder


def config(path, **changes) -> CorpusConfig:
    base = {
        "path": str(path),
        "format": "text",
        "sentences": "line",
        "shard_bytes": 20_000,
        "workers": 0,
        "held_out": HashSplit(fraction=0.1),
        "tokenizer": ByteBPEConfig(vocab_size=300),
    }
    return CorpusConfig(**(base | changes))


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return write_stories(tmp_path_factory.mktemp("stories") / "text", 4, 100)


@pytest.fixture(scope="module")
def corpus(stories, tmp_path_factory):
    return CorpusReader(prepare_corpus(config(stories), tmp_path_factory.mktemp("corpus") / "c", progress=False))


def document_texts(reader: CorpusReader, split: str) -> list[str]:
    found = []
    for shard, lo, hi in reader.split_documents(split):
        starts, ends = reader.document_spans(shard, lo, hi)
        for start, end in zip(starts, ends, strict=True):
            found.append(reader.tokenizer.decode(reader.gather(np.array([start]), np.array([end - start]))))
    return found


def tree_hash(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# ---------------------------------------------------------------- contents


def test_every_document_is_there_once_and_unchanged(corpus):
    train, held_out = document_texts(corpus, "train"), document_texts(corpus, "held_out")
    assert sorted(train + held_out) == sorted(story(i) for i in range(400))
    assert 15 < len(held_out) < 80
    assert corpus.num_shards > 1


def test_terminators_flags_bytes_and_origins(corpus, stories):
    for shard in range(corpus.num_shards):
        documents = int(corpus.documents[shard])
        starts, ends = corpus.document_spans(shard, 0, documents)
        assert starts[0] == corpus.token_base[shard] and ends[-1] + 1 == corpus.token_base[shard + 1]
        assert (starts[1:] == ends[:-1] + 1).all()
        assert (corpus.gather(ends, np.ones(documents, np.int64)) == corpus.special.eot).all()
        assert (corpus.gather_flags(ends, np.ones(documents, np.int64)) == 0).all()
        sizes = corpus.document_bytes(shard, 0, documents)
        for i in range(0, documents, 7):
            ids = corpus.gather(starts[i : i + 1], ends[i : i + 1] - starts[i])
            flags = corpus.gather_flags(starts[i : i + 1], ends[i : i + 1] - starts[i])
            text = corpus.tokenizer.decode(ids)
            assert len(text.encode()) == sizes[i]
            begins = np.flatnonzero(flags & 2)
            cut = [corpus.tokenizer.decode(part) for part in np.split(ids, begins[1:])]
            assert [line.strip("\n") for line in cut] == text.split("\n")
            name, offset = corpus.document_origin(shard, i)
            raw = (stories / name).read_bytes()
            raw = gzip.decompress(raw) if name.endswith(".gz") else raw
            assert raw[offset:].decode().startswith(text)
            lo, hi = corpus.document_spans(shard, i, i + 1)
            assert (lo[0], hi[0]) == (starts[i], ends[i])


def test_totals_agree(corpus):
    totals = corpus.manifest["totals"]
    assert totals["documents"] == 400 and totals["tokens"] == int(corpus.tokens.sum())
    assert corpus.split_bytes("train") + corpus.split_bytes("held_out") == totals["bytes"]
    assert totals["bytes"] == sum(len(story(i).encode()) for i in range(400))
    assert totals["sentences"] == sum(story(i).count("\n") + 1 for i in range(400))
    summed = super(CorpusReader, corpus).split_bytes("held_out")
    assert summed == corpus.split_bytes("held_out")
    spans = [hi - lo for _, lo, hi in corpus.split_tokens("train") + corpus.split_tokens("held_out")]
    assert sum(spans) == totals["tokens"]
    corpus.verify()


def test_equal_documents_fall_on_the_same_side(tmp_path):
    path = tmp_path / "twice.txt"
    path.write_text("\n\n".join(story(i % 50) for i in range(200)))
    reader = CorpusReader(prepare_corpus(config(path, held_out=HashSplit(fraction=0.5)), tmp_path / "c", False))
    train, held_out = document_texts(reader, "train"), document_texts(reader, "held_out")
    assert train and held_out and not set(train) & set(held_out)


def test_held_out_documents_do_not_train_the_tokenizer(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(chr(0x4E00 + i) * 3 for i in range(300)))
    settings = config(path, held_out=HashSplit(fraction=0.3), tokenizer=CharactersConfig())
    reader = CorpusReader(prepare_corpus(settings, tmp_path / "c", False))
    assert reader.vocab_size == 6 + int(reader.train_documents.sum())
    assert set("".join(document_texts(reader, "held_out"))) == set("[UNK]")


def test_position_split_cuts_where_nanogpt_cuts(tmp_path):
    text = "To be, or not to be.\n\nThat is the question:\n" * 20 + "x"
    (tmp_path / "play.txt.gz").write_bytes(gzip.compress(text.encode()))
    settings = config(
        tmp_path / "play.txt.gz",
        format="file",
        sentences="none",
        held_out=PositionSplit(),
        tokenizer=CharactersConfig(),
    )
    reader = CorpusReader(prepare_corpus(settings, tmp_path / "c", False))
    cut = int(len(text) * 0.9)
    decoded = [document_texts(reader, split)[0] for split in ("train", "held_out")]
    assert decoded[0] == text[:cut] and decoded[1].replace("[UNK]", "x") == text[cut:]


def test_shuffling_is_keyed_and_optional(stories, tmp_path):
    orders = []
    for i, changes in enumerate([{"shuffle_documents": False}, {"seed": 0}, {"seed": 1}]):
        reader = CorpusReader(prepare_corpus(config(stories, **changes), tmp_path / str(i), False))
        orders.append(document_texts(reader, "train"))
    numbers = [[int(t.split(".")[0].split()[-1]) for t in order] for order in orders]
    assert numbers[0] == sorted(numbers[0]) and numbers[1] != sorted(numbers[1])
    assert numbers[1] != numbers[2]


# ---------------------------------------------------------------- the same bytes


def test_workers_and_location_do_not_matter(stories, corpus, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(stories, moved)
    out = prepare_corpus(config(moved, workers=2), tmp_path / "c", progress=False)
    again = CorpusReader(out)
    assert again.fingerprint == corpus.fingerprint
    ours, theirs = tree_hash(out), tree_hash(corpus.path)
    assert {k: v for k, v in ours.items() if k != "plan.json"} == {k: v for k, v in theirs.items() if k != "plan.json"}


def test_a_finished_corpus_is_not_touched_again(stories, tmp_path):
    out = prepare_corpus(config(stories), tmp_path / "c", progress=False)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    lines: list[str] = []
    prepare_corpus(config(stories), out, progress=lines.append)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before and not lines


def test_killed_and_restarted_gives_the_same_bytes(tmp_path):
    folder = write_stories(tmp_path / "text", 10, 150)
    settings = config(folder, shard_bytes=20_000, workers=2)
    whole = prepare_corpus(settings, tmp_path / "whole", progress=False)
    (tmp_path / "config.json").write_text(settings.model_dump_json())
    out = tmp_path / "killed"
    code = "from bertgpt_jax.commands.prepare import main; main()"
    command = [sys.executable, "-c", code, "--config", str(tmp_path / "config.json"), "--out", str(out)]
    for finished in (1, 4):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(out.glob("shard-*/done.json"))) < finished and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "manifest.json").exists()
    time.sleep(1)  # orphans notice that their parent is gone
    kept = {p: p.stat().st_mtime_ns for p in out.glob("shard-*/done.json")}
    shards = sorted(out.glob("shard-*"))
    shutil.rmtree(shards[0] / "doc_hash")  # a shard that is not whole is made again
    kept.pop(shards[0] / "done.json", None)
    lines: list[str] = []
    prepare_corpus(settings, out, progress=lines.append)
    assert lines[0].startswith(f"continuing: {len(kept)} of ")
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    assert tree_hash(out) == tree_hash(whole)


def test_open_corpus_prepares_once_and_opens_prepared_ones(stories, tmp_path):
    first = open_corpus(config(stories), tmp_path / "cache", progress=False)
    second = open_corpus(config(stories, workers=1), tmp_path / "cache", progress=False)
    assert first.path == second.path and first.path.parent == tmp_path / "cache"
    other = open_corpus(config(stories, seed=5), tmp_path / "cache", progress=False)
    assert other.path != first.path and other.fingerprint != first.fingerprint
    direct = open_corpus(CorpusConfig(path=str(first.path)), tmp_path / "cache2")
    assert direct.fingerprint == first.fingerprint and not (tmp_path / "cache2").exists()
    same = ByteBPEConfig(path=str(first.path / "tokenizer"))
    assert open_corpus(CorpusConfig(path=str(first.path), tokenizer=same), tmp_path).fingerprint == first.fingerprint
    different = ByteBPEConfig(path=str(other.path / "tokenizer"))
    with pytest.raises(ConfigError, match="tokenizer.path.*is not the tokenizer of the prepared corpus"):
        open_corpus(CorpusConfig(path=str(first.path), tokenizer=different), tmp_path)


# ---------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def many_chunks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chunks")
    text = "\n\n".join(story(i) for i in range(1500))
    (folder / "a.txt").write_text(text)
    settings = config(folder / "a.txt", shard_bytes=150_000, tokenizer=CharactersConfig())
    return prepare_corpus(settings, folder / "c", progress=False)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 60), longest=st.sampled_from([1, 100, 30_000]))
def test_cached_chunks_equal_resident_arrays(many_chunks, seed, count, longest):
    resident, cached = CorpusReader(many_chunks), CorpusReader(many_chunks, memory_budget=1)
    rng = np.random.default_rng(seed)
    shard = rng.integers(0, resident.num_shards, count)
    lengths = np.minimum(rng.integers(0, longest + 1, count), resident.tokens[shard])
    starts = resident.token_base[shard] + rng.integers(0, resident.tokens[shard] - lengths + 1)
    for _ in range(2):
        assert (resident.gather(starts, lengths) == cached.gather(starts, lengths)).all()
        assert (resident.gather_flags(starts, lengths) == cached.gather_flags(starts, lengths)).all()
    expected = [resident.gather(s[None], n[None]) for s, n in zip(starts, lengths, strict=True)]
    assert resident.gather(starts, lengths).tolist() == [int(i) for part in expected for i in part]


def test_threads_share_a_cached_reader(many_chunks):
    from concurrent.futures import ThreadPoolExecutor

    cached, resident = CorpusReader(many_chunks, memory_budget=1), CorpusReader(many_chunks)
    starts = np.arange(0, int(resident.token_base[1]) - 200, 997)
    rows = [(np.roll(starts, i), np.full(len(starts), 150)) for i in range(32)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: cached.gather(*row), rows))
    assert all((a == resident.gather(*row)).all() for a, row in zip(found, rows, strict=True))


def test_in_memory_corpus_has_the_same_view(corpus):
    documents = {"train": [], "held_out": []}
    for split, found in documents.items():
        for shard, lo, hi in corpus.split_documents(split):
            starts, ends = corpus.document_spans(shard, lo, hi)
            for s, e in zip(starts, ends, strict=True):
                ids = corpus.gather(np.array([s]), np.array([e - s]))
                flags = corpus.gather_flags(np.array([s]), np.array([e - s]))
                found.append([part.tolist() for part in np.split(ids, np.flatnonzero(flags & 2)[1:])])
    memory = InMemoryCorpus(documents["train"], corpus.vocab_size, corpus.special, documents["held_out"], shards=3)
    assert memory.num_shards == 3
    assert memory.documents.sum() == corpus.documents.sum() and memory.tokens.sum() == corpus.tokens.sum()
    flat = [i for d in documents["train"] for sentence in d for i in sentence]
    spans = [memory.document_spans(*row) for row in memory.split_documents("train")]
    starts, ends = (np.concatenate(column) for column in zip(*spans, strict=True))
    assert memory.gather(starts, ends - starts).tolist() == flat
    assert (memory.gather_flags(starts, np.ones_like(starts)) == 3).all()
    assert (memory.gather(ends, np.ones_like(ends)) == corpus.special.eot).all()


def test_workers_do_not_import_jax():
    code = "import sys, bertgpt_jax.corpus.worker, bertgpt_jax.corpus.builder; print([m for m in sys.modules if m in "
    code += "('jax', 'flax', 'grain', 'orbax', 'torch')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---------------------------------------------------------------- damage


def copy_of(corpus, tmp_path) -> Path:
    shutil.copytree(corpus.path, tmp_path / "copy")
    return tmp_path / "copy"


def read_all(path: Path) -> None:
    reader = CorpusReader(path)
    reader.gather(reader.token_base[:-1], reader.tokens)
    reader.gather_flags(reader.token_base[:-1], reader.tokens)
    for shard in range(reader.num_shards):
        reader.document_spans(shard, 0, int(reader.documents[shard]))
        reader.document_bytes(shard, 0, int(reader.documents[shard]))
    assert reader.tokenizer.vocab_size == reader.vocab_size


def test_a_flipped_bit_is_an_error(corpus, tmp_path):
    path = copy_of(corpus, tmp_path)
    rng = np.random.default_rng(1)
    files = [p for name in ("tokens", "flags", "doc_end", "doc_bytes") for p in path.glob(f"shard-*/{name}/c/*")]
    assert len(files) == 4 * corpus.num_shards
    for file in files:
        good = file.read_bytes()
        changed = bytearray(good)
        # an outer chunk is padded with nothing: every byte is data, checksum or index
        changed[rng.integers(len(good))] ^= 1 << rng.integers(8)
        file.write_bytes(bytes(changed))
        with pytest.raises(DataError, match="shard-.*prepare"):
            read_all(path)
        file.write_bytes(good)
    read_all(path)


def remove_shard(path):
    shutil.rmtree(path / "shard-00001-of-00004", ignore_errors=True)


def swap_shards(path):
    a, b = sorted(path.glob("shard-*"))[:2]
    a.rename(path / "x")
    b.rename(a)
    (path / "x").rename(b)


def truncate_chunk(path):
    file = next(path.glob("shard-00000*/tokens/c/0"))
    file.write_bytes(file.read_bytes()[:100])


def truncate_manifest(path):
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-200])


def edit_manifest(path):
    tree = json.loads((path / "manifest.json").read_text())
    tree["shards"]["train_documents"][0] += 1
    (path / "manifest.json").write_text(json.dumps(tree))


def other_version(path):
    tree = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(tree | {"format_version": 99}))


def edit_tokenizer(path):
    file = path / "tokenizer" / "merges.txt"
    lines = file.read_text().split("\n")
    lines[1], lines[2] = lines[2], lines[1]
    file.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_shard, "shards are missing: shard-00001"),
        (swap_shards, "another shard"),
        (truncate_chunk, "tokens"),
        (truncate_manifest, "manifest.json: damaged"),
        (edit_manifest, "fingerprint"),
        (other_version, "format_version 99"),
        (edit_tokenizer, "tokenizer: sha256"),
        (lambda path: (path / "manifest.json").unlink(), "no finished corpus"),
    ],
)
def test_damage_is_named(corpus, tmp_path, damage, words):
    assert corpus.num_shards == 4
    path = copy_of(corpus, tmp_path)
    damage(path)
    with pytest.raises(DataError, match=words) as error:
        read_all(path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- bad input


def bad_source(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


BAD = {
    "not json": ("a.jsonl", '{"text": "ok"}\n{"text": \n', {}, DataError, ["a.jsonl:2", "not JSON"]),
    "no field": ("a.jsonl", '{"text": "x"}\n\n{"body": "y"}\n', {}, DataError, ["a.jsonl:3", "'text'", "body"]),
    "no string": ("a.jsonl", '{"text": 5}\n', {}, DataError, ["a.jsonl:1", "int"]),
    "no object": ("a.jsonl", "[1]\n", {}, DataError, ["a.jsonl:1", "list"]),
    "json": ("a.json", '[{"text": "x"}]', {}, DataError, ["a.json", ".jsonl"]),
    "empty": ("a.txt", "", {}, DataError, ["no document is left", "0 read"]),
    "blank": ("a.txt", " \n\n \n", {}, DataError, ["no document is left"]),
    "short": ("a.txt", "ab\n\ncd", {"cleaning.min_characters": 3}, DataError, ["of 2 read", "min_characters 2"]),
    "stubs": ("wiki", '<doc id="1">\nTitle\n\n</doc>\n', {}, DataError, ["of 1 read", "title_stubs 1"]),
    "utf-8": ("a.txt", b"good\n\nbad \xff\n", {"cleaning.invalid_utf8": "error"}, DataError, ["0xff", "offset 10"]),
    "utf-16": ("a.txt", "text".encode("utf-16"), {}, DataError, ["UTF-16"]),
    "binary": ("a.txt", bytes(range(256)) * 2 + bytes(100), {}, DataError, ["binary", "NUL"]),
    "parquet": ("a.txt", b"PAR1 and so on", {}, DataError, ["Parquet"]),
    "suffix": ("a.parquet", b"x", {}, DataError, [".parquet"]),
    "no gzip": ("a.txt.gz", b"plain text", {}, DataError, ["a.txt.gz", "no gzip"]),
    "cut gzip": ("a.txt.gz", gzip.compress(b"word " * 9999)[:-20], {}, DataError, ["a.txt.gz", "damaged gzip"]),
    "shard missing": ("x-00001-of-00003.txt", "text", {}, DataError, ["x-00000-of-00003", "x-00002-of-00003"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_explained(tmp_path, name):
    file, content, changes, kind, words = BAD[name]
    settings = config(bad_source(tmp_path, file, content), format="auto", tokenizer=CharactersConfig())
    settings = apply_overrides(settings, [f"{k}={v}" for k, v in changes.items()])
    with pytest.raises(kind) as error:
        prepare_corpus(settings, tmp_path / "c", progress=False)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "c").exists(), "nothing is left that would stand in the way of the next try"


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("", ConfigError, "corpus.path is empty: this config needs your text; pass corpus.path=FILE"),
        ("/nowhere/at/all", ConfigError, "'/nowhere/at/all': no such file"),
        ("/nowhere/*.txt", ConfigError, "no file matches"),
    ],
)
def test_bad_paths(tmp_path, path, kind, words):
    with pytest.raises(kind, match=words.replace("*", r"\*").replace("(", r"\(")):
        prepare_corpus(config(path), tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()


def test_the_same_file_twice(tmp_path):
    path = bad_source(tmp_path, "a.txt", "text")
    with pytest.raises(DataError, match=r"a\.txt twice"):
        prepare_corpus(config("x").model_copy(update={"path": (path, str(tmp_path))}), tmp_path / "c", False)


def test_everything_held_out(tmp_path):
    path = bad_source(tmp_path, "a.txt", "one\n\ntwo")
    with pytest.raises(DataError, match="all 2 documents are held out"):
        prepare_corpus(config(path, held_out=HashSplit(fraction=0.999999)), tmp_path / "c", False)


def test_an_empty_directory(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no files"):
        prepare_corpus(config(tmp_path / "empty"), tmp_path / "c", False)


def test_output_that_is_something_else(stories, corpus, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "precious.txt").write_text("x")
    with pytest.raises(ConfigError, match="is no tokenised corpus"):
        prepare_corpus(config(stories), tmp_path / "c", False)
    with pytest.raises(ConfigError, match="other sources or settings"):
        prepare_corpus(config(stories, seed=9), corpus.path, False)
    copied = copy_of(corpus, tmp_path)
    (copied / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="other sources or settings"):
        prepare_corpus(config(stories, seed=9), copied, False)
    with pytest.raises(DataError, match="no finished corpus"):
        open_corpus(CorpusConfig(path=str(copied)), tmp_path / "cache")


def test_a_workers_error_arrives_with_its_kind_and_line(tmp_path):
    path = bad_source(tmp_path, "a.jsonl", '{"text": "ok"}\nnope\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        prepare_corpus(config(path, format="auto", workers=1), tmp_path / "c", False)


def test_a_source_that_vanishes_is_named(stories, tmp_path):
    from collections import Counter

    from bertgpt_jax.corpus.plan import find_request, make_plan
    from bertgpt_jax.corpus.shards import shard_documents
    from bertgpt_jax.errors import StorageError

    folder = tmp_path / "text"
    shutil.copytree(stories, folder)
    plan = make_plan(config(folder), *find_request(config(folder)))
    (folder / "0.txt").unlink()
    with pytest.raises(StorageError, match="0.txt: cannot be read"):
        list(shard_documents(plan, 0, Counter()))


def test_what_is_not_ours_stays_when_a_build_is_given_up(tmp_path):
    for name in ("plan.json", "shard-0/done.json", ".tokenizer.7/vocab.txt", "mine.txt"):
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).write_text("x")
    remove_named(tmp_path / "c", _PARTS)
    assert [p.name for p in (tmp_path / "c").rglob("*")] == ["mine.txt"]


def test_a_worker_without_a_parent_ends_in_silence(corpus):
    command = [sys.executable, "-m", "bertgpt_jax.corpus.worker", str(corpus.path / "plan.json"), str(corpus.path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.communicate(b'{"sample": 0, "bytes": 10, "documents": 1}\n', timeout=60)[1] == b""
    assert process.returncode == 0


def test_a_dead_worker_is_named(tmp_path):
    from bertgpt_jax.corpus.pool import Pool
    from bertgpt_jax.errors import PeerError

    (tmp_path / "plan.json").write_text("not a plan")
    with Pool(tmp_path / "plan.json", tmp_path) as pool, pytest.raises(PeerError, match="exit code 1"):
        pool.start(1)
        list(pool.run([{"tokenise": 0}], lambda answer: "done" in answer))


def test_odd_text_is_kept(tmp_path):
    texts = ["x" * 3_000_000, "nul\x00 in it", "\ufeffmark", "tab\tand  spaces", "last \u2028 one"]
    path = bad_source(tmp_path, "a.txt", "\n\n".join(texts))
    settings = config(path, held_out=HashSplit(fraction=0), tokenizer=ByteBPEConfig(vocab_size=263))
    reader = CorpusReader(prepare_corpus(settings, tmp_path / "c", False))
    assert sorted(document_texts(reader, "train")) == sorted(t.replace("\x00", "").lstrip("\ufeff") for t in texts)
    assert reader.manifest["cleaning"]["control_characters"] == 1
    assert reader.manifest["cleaning"]["documents_read"] == 5


def test_published_vocabulary_with_a_small_corpus(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "##s"]
    path = bad_source(tmp_path, "vocab.txt", "\n".join(vocabulary))
    text = bad_source(tmp_path, "a.txt", "one ones two")
    reader = CorpusReader(prepare_corpus(config(text, tokenizer=WordPieceConfig(path=path)), tmp_path / "c", False))
    assert reader.special.eot == 3 and reader.manifest["totals"]["unknown"] == 1
    assert reader.gather(np.array([0]), reader.tokens).tolist() == [5, 5, 6, 1, 3]
    assert reader.gather_flags(np.array([0]), reader.tokens).tolist() == [3, 1, 0, 1, 0]
