"""Corpora and sources in buckets: a server that speaks S3's protocol, `memory://`, `file://`, and an fsspec bucket."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import importlib.util
import threading
import urllib.parse
from pathlib import Path

import pytest

from bertgpt_jax.commands.prepare import main
from bertgpt_jax.corpus import places, remote
from bertgpt_jax.corpus.builder import open_corpus, prepare_corpus
from bertgpt_jax.corpus.config import ByteBPEConfig, CharactersConfig, CorpusConfig, HashSplit
from bertgpt_jax.corpus.places import BucketPath, find_place
from bertgpt_jax.corpus.reader import CorpusReader
from bertgpt_jax.errors import ConfigError, DataError, StorageError

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


class _Objects(http.server.BaseHTTPRequestHandler):
    """As much of S3 as TensorStore asks for: put, get (ranges), head, delete, list; `If-None-Match` and `If-Match`."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]

    def log_message(self, *_: object) -> None: ...

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _key(self) -> tuple[str, dict[str, list[str]]]:
        parts = urllib.parse.urlsplit(self.path)
        return urllib.parse.unquote(parts.path), urllib.parse.parse_qs(parts.query, keep_blank_values=True)

    def do_GET(self) -> None:
        key, query = self._key()
        if "list-type" in query:
            found = sorted(k for k in self.objects if k.startswith(f"{key.rstrip('/')}/{query.get('prefix', [''])[0]}"))
            rows = "".join(f"<Contents><Key>{k.split('/', 2)[2]}</Key></Contents>" for k in found)
            count = f"<KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated>"
            self._answer(200, f'<?xml version="1.0"?><ListBucketResult>{count}{rows}</ListBucketResult>'.encode())
        elif key not in self.objects:
            self._answer(404)
        else:
            data = self.objects[key]
            tag = f'"{hashlib.md5(data).hexdigest()}"'
            asked = self.headers.get("Range", "").removeprefix("bytes=")
            if self.headers.get("If-None-Match") == tag:
                self._answer(304)
            elif asked:
                lo, _, hi = asked.partition("-")
                start = int(lo) if lo else len(data) - int(hi)
                stop = min(int(hi) + 1, len(data)) if lo and hi else len(data)
                where = f"bytes {start}-{stop - 1}/{len(data)}"
                self._answer(206, data[start:stop], ETag=tag, Content_Range=where)
            else:
                self._answer(200, data, ETag=tag)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        key, _ = self._key()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("If-None-Match") == "*" and key in self.objects:
            self._answer(412)
            return
        self.objects[key] = data
        self._answer(200, ETag=f'"{hashlib.md5(data).hexdigest()}"')

    def do_DELETE(self) -> None:
        self.objects.pop(self._key()[0], None)
        self._answer(204)


@pytest.fixture
def s3(monkeypatch):
    """The objects of a server, by `/bucket/key`; the environment points S3's clients to it."""
    handler = type("Handler", (_Objects,), {"objects": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in KEYS:
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield handler.objects
    server.shutdown()
    server.server_close()


@pytest.fixture
def bucket(monkeypatch):
    """A bucket of sources: fsspec's memory in place of the client of `s3://`."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = "s3"
        store: dict = {}
        pseudo_dirs = [""]

    monkeypatch.setitem(remote._CLIENTS, "s3", ("fsspec", "s3"))
    fsspec.register_implementation("s3", Bucket, clobber=True)
    return Bucket()


def write_texts(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(3):
        texts = "\n\n".join(f"Text {i}.{k} of the test. It has words: {'so on ' * (k % 20)}" for k in range(150))
        (folder / f"{i}.txt.gz").write_bytes(gzip.compress(texts.encode(), mtime=0))
    return folder


def config(path: object, **changes: object) -> CorpusConfig:
    settings = {"shard_bytes": 16_000, "workers": 0, "tokenizer": ByteBPEConfig(vocab_size=280)}
    return CorpusConfig(path=str(path), format="text", **(settings | changes))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def objects(address: str) -> dict[str, bytes]:
    place = BucketPath(address)
    return {key: (place / key).read_bytes() for key in place.keys()}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    return prepare_corpus(config(write_texts(folder / "text")), folder / "corpus", progress=False)


# ---------------------------------------------------------------- corpora


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_corpus_in_a_bucket_has_the_same_objects(local, s3, workers):
    made = prepare_corpus(config(local.parent / "text", workers=workers), "s3://bucket/some/corpus", progress=False)
    found = {key.removeprefix("/bucket/some/corpus/"): value for key, value in s3.items()}
    plan = found.pop("plan.json")  # holds the number of workers
    assert found | {"plan.json": plan if not workers else files(local)["plan.json"]} == files(local)
    reader, ours = CorpusReader("s3://bucket/some/corpus", memory_budget=0), CorpusReader(local)
    assert str(made) == str(reader.path) == "s3://bucket/some/corpus"
    assert reader.fingerprint == ours.fingerprint and reader.tokenizer.sha256 == ours.tokenizer.sha256
    lengths = reader.tokens
    assert (reader.gather(reader.token_base[:-1], lengths) == ours.gather(ours.token_base[:-1], lengths)).all()
    assert open_corpus(CorpusConfig(path=str(made)), "unused", progress=False).fingerprint == ours.fingerprint


def test_the_command_writes_to_and_checks_a_bucket(local, s3, capsys):
    settings = ["format=text", "shard_bytes=16000", "workers=0", "tokenizer.kind=byte_bpe", "tokenizer.vocab_size=280"]
    assert main([str(local.parent / "text"), "--quiet", "--out", "s3://bucket/c", *settings]) == 0
    assert main(["--check", "s3://bucket/c"]) == 0
    assert "every sha256 matches" in capsys.readouterr().out
    key = next(k for k in sorted(s3) if "/tokens/c/" in k)
    s3[key] = s3[key][:40] + bytes([s3[key][40] ^ 1]) + s3[key][41:]
    assert main(["--check", "s3://bucket/c"]) == DataError.exit_code
    assert "s3://bucket/c/shard-00000" in capsys.readouterr().err


def test_half_a_corpus_in_a_bucket_is_continued(local, s3):
    """What is left when a build is killed: shards without `done.json`, no manifest."""
    settings = config(local.parent / "text")
    prepare_corpus(settings, "s3://bucket/c", progress=False)
    whole = dict(s3)
    done = sorted(key for key in s3 if key.endswith("done.json"))
    assert len(done) > 2
    for key in (done[0], done[2], "/bucket/c/manifest.json"):
        del s3[key]
    s3[done[0].replace("done.json", "tokens/c/77")] = b"of another build"
    with pytest.raises(DataError, match="s3://bucket/c is no finished corpus"):
        CorpusReader("s3://bucket/c")
    lines: list[str] = []
    prepare_corpus(settings, "s3://bucket/c", progress=lines.append)
    assert lines[0].startswith(f"continuing: {len(done) - 2} of {len(done)} ")
    assert dict(s3) == whole
    with pytest.raises(ConfigError, match="s3://bucket/c holds a corpus of other"):
        prepare_corpus(config(local.parent / "text", seed=1), "s3://bucket/c", progress=False)
    with pytest.raises(ConfigError, match="s3://bucket exists and is no tokenised corpus"):
        prepare_corpus(settings, "s3://bucket", progress=False)


def test_nothing_is_left_of_a_build_that_cannot_be(local, s3):
    with pytest.raises(DataError, match="vocab_size = 9000"):
        prepare_corpus(
            config(local.parent / "text", tokenizer=ByteBPEConfig(vocab_size=9000)), "s3://bucket/c", progress=False
        )
    assert dict(s3) == {}
    place = BucketPath("s3://bucket/d")
    for name in ("plan.json", "shard-0/done.json", "shards.txt"):
        (place / name).write_bytes(b"x")
    places.remove_named(place, ("plan.", "shard-"))
    assert list(s3) == ["/bucket/d/shards.txt"]


def test_missing_shards_of_a_bucket_are_named(local, s3):
    prepare_corpus(config(local.parent / "text"), "s3://bucket/c", progress=False)
    for key in [k for k in s3 if "/shard-00001" in k]:
        del s3[key]
    reader = CorpusReader("s3://bucket/c")
    with pytest.raises(DataError, match="shard-00001"):
        reader.gather(reader.token_base[:-1], reader.tokens)


def test_memory_is_one_place(local):
    prepare_corpus(config(local.parent / "text"), "memory://tests/one", progress=False)
    assert objects("memory://tests/one") == files(local)
    assert CorpusReader("memory://tests/one").fingerprint == CorpusReader(local).fingerprint
    BucketPath("memory://tests/one").delete()
    assert places.is_empty(BucketPath("memory://tests"))


def test_file_addresses_are_paths(local, tmp_path):
    source = f"file://{local.parent / 'text'}"
    made = prepare_corpus(config(source), f"file://{tmp_path}/corpus", progress=False)
    assert made == tmp_path / "corpus"
    same = {name: data for name, data in files(made).items() if name != "plan.json"}
    assert same == {name: data for name, data in files(local).items() if name != "plan.json"}
    assert CorpusReader(f"file://{made}").fingerprint == CorpusReader(local).fingerprint


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("pattern", ["s3://texts/wiki", "s3://texts/wiki/*.gz", "s3://texts/wiki/**"])
def test_sources_in_a_bucket(local, bucket, tmp_path, pattern):
    for name, data in files(local.parent / "text").items():
        bucket.pipe_file(f"/texts/wiki/{name}", data)
    if "*" not in pattern:
        bucket.pipe_file("/texts/wiki/.hidden/x.txt", b"not this")
    made = CorpusReader(prepare_corpus(config(pattern), tmp_path / "c", progress=False))
    ours = CorpusReader(local)
    assert made.fingerprint == ours.fingerprint
    assert made.manifest["sources"] == ours.manifest["sources"]


def test_one_object_and_its_changes(bucket, tmp_path):
    bucket.pipe_file("/texts/a.txt", b"One text.\n\nTwo texts.\n")
    made = CorpusReader(prepare_corpus(config("s3://texts/a.txt", **CHARACTERS), tmp_path / "c", progress=False))
    assert made.manifest["totals"]["documents"] == 2
    bucket.pipe_file("/texts/a.txt", b"One text.\n\nTwo texts!\n")
    with pytest.raises(ConfigError, match="other sources"):
        prepare_corpus(config("s3://texts/a.txt", **CHARACTERS), tmp_path / "c", progress=False)


CHARACTERS = {"tokenizer": CharactersConfig(), "held_out": HashSplit(fraction=0)}


@pytest.mark.parametrize(
    ("name", "data", "error", "words"),
    [
        ("a.txt.gz", b"plain", DataError, "s3://texts/a.txt.gz ends in .gz"),
        ("a.txt", b"PK\x03\x04", DataError, "s3://texts/a.txt: this is zip"),
        ("a.parquet", b"PAR1 and more", DataError, "s3://texts/a.parquet: parquet is read from this machine's"),
    ],
)
def test_bad_objects_are_named(bucket, tmp_path, name, data, error, words):
    bucket.pipe_file(f"/texts/{name}", data)
    with pytest.raises(error, match=words):
        prepare_corpus(CorpusConfig(path=f"s3://texts/{name}"), tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()


# ---------------------------------------------------------------- addresses


def test_addresses():
    assert find_place("/a/b") == Path("/a/b") and find_place("file:///a/b") == Path("/a/b")
    place = find_place("gs://bucket//a/b/")
    assert str(place) == "gs://bucket/a/b" and str(place / "c") == "gs://bucket/a/b/c" and place.name == "b"
    assert place.spec(directory=True) == {"driver": "gcs", "bucket": "bucket", "path": "a/b/"}
    assert place.spec(directory=False) == {"driver": "gcs", "bucket": "bucket", "path": "a/b"}


def test_s3_settings_come_from_the_environment(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", *KEYS):
        monkeypatch.delenv(name, raising=False)
    plain = {"driver": "s3", "bucket": "b", "path": "c/"}
    assert BucketPath("s3://b/c").spec(True) == plain
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert BucketPath("s3://b/c").spec(True) == plain | {"aws_region": "eu-west-1"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other:9000/")
    assert BucketPath("s3://b/c").spec(True) == plain | {"aws_region": "eu-west-1", "endpoint": "http://other:9000"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    assert BucketPath("s3://b/c").spec(True)["aws_credentials"] == {"type": "environment"}


@pytest.mark.parametrize(
    ("address", "words"),
    [("hdfs://name/run", "hdfs://"), ("gs://", "names no bucket"), ("s3:///", "names no bucket")],
)
def test_bad_addresses(tmp_path, address, words):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=words):
        prepare_corpus(config(tmp_path / "a.txt"), address, progress=False)
    with pytest.raises(ConfigError, match=words):
        CorpusReader(address)


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_sources_without_their_client_say_what_to_install(scheme, extra, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{scheme}://b/x.*bertgpt_jax\[{extra}\]"):
        remote.find_remote(f"{scheme}://b/x")


def test_a_bucket_that_refuses_is_named(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")

    def refuse(store):
        raise ValueError("PERMISSION_DENIED: no\nmore")

    with pytest.raises(StorageError, match="cannot read 's3://bucket/c': PERMISSION_DENIED: no; check") as error:
        BucketPath("s3://bucket/c")._do("read", False, refuse)
    assert "\n" not in str(error.value)
