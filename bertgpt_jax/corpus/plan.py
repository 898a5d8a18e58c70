"""What a build does, decided before it starts: the files, the shards, and a fingerprint of both."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from bertgpt_jax.config import build, fingerprint, identity
from bertgpt_jax.corpus.chinese import jieba_version
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.corpus.cuts import cut_source
from bertgpt_jax.corpus.files import SourceFile, find_files
from bertgpt_jax.corpus.kinds import open_tokenizer
from bertgpt_jax.corpus.places import Place, remove_leftovers, write_whole
from bertgpt_jax.errors import StorageError

FORMAT_VERSION = 1
PLAN_FILE = "plan.json"
MIN_SHARD_BYTES = 4_000_000
"""Small sources are cut no finer than this, for parallel work, and no coarser than a sixteenth of their size."""
_GZIP_RATIO = 3


@dataclasses.dataclass(frozen=True)
class Piece:
    """Documents of the file number `file`: those of positions `[lo, hi)`, as `cut_source` made them; `size` bytes."""

    file: int
    lo: int
    hi: int
    size: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A build.

    Attributes:
        config: what was asked for.
        files: the source files, in order.
        shards: the pieces each shard is made of.
        request: sha256 (hex) of all that decides the result: sources, settings, the tokenizer's files.
        duplicates: directory with the numbers of the documents to drop, a file a shard; "" drops none.
    """

    config: CorpusConfig
    files: tuple[SourceFile, ...]
    shards: tuple[tuple[Piece, ...], ...]
    request: str
    duplicates: str = ""

    def shard_size(self, index: int) -> int:
        """Uncompressed bytes of a shard's pieces."""
        return sum(piece.size for piece in self.shards[index])


def find_request(config: CorpusConfig) -> tuple[tuple[SourceFile, ...], str]:
    """The source files and the fingerprint of the request; reads little of large files."""
    files = find_files(config)
    vocabulary = open_tokenizer(config.tokenizer).sha256 if config.tokenizer.path else ""
    sources = [[f.name, f.format, f.size, f.digest] for f in files]
    words = [jieba_version()] if config.chinese_words == "jieba" else []
    return files, fingerprint([FORMAT_VERSION, identity(config), sources, vocabulary, *words])


def expected_shards(config: CorpusConfig, files: tuple[SourceFile, ...]) -> int:
    """About how many shards `make_plan` will cut."""
    estimate, target = _estimate(config, files)
    return max(1, estimate // target)


def _estimate(config: CorpusConfig, files: tuple[SourceFile, ...]) -> tuple[int, int]:
    """Bytes of text in the files, by their sizes; and how many a shard should have."""
    estimate = sum(f.size * (_GZIP_RATIO if f.path.endswith(".gz") else 1) for f in files)
    return estimate, min(config.shard_bytes, max(MIN_SHARD_BYTES, estimate // 16))


def make_plan(config: CorpusConfig, files: tuple[SourceFile, ...], request: str) -> Plan:
    """Cuts the files into shards of at most `shard_bytes` (a document is never cut); decompresses gzip files once."""
    _, target = _estimate(config, files)
    shards: list[tuple[Piece, ...]] = []
    held: list[Piece] = []
    size = 0
    for number, file in enumerate(files):
        for lo, hi, bytes_ in cut_source(file, target, config):
            if held and size + bytes_ > target:
                shards.append(tuple(held))
                held, size = [], 0
            held.append(Piece(number, lo, hi, bytes_))
            size += bytes_
    shards.append(tuple(held))
    return Plan(config, files, tuple(shards), request)


def plan_to_json(plan: Plan) -> str:
    """The plan as a worker reads it."""
    tree = {
        "config": plan.config.model_dump(mode="json"),
        "files": [dataclasses.astuple(f) for f in plan.files],
        "shards": [[dataclasses.astuple(p) for p in pieces] for pieces in plan.shards],
        "request": plan.request,
        "duplicates": plan.duplicates,
    }
    return json.dumps(tree) + "\n"


def write_plan(plan: Plan, out: Place) -> None:
    """Makes `out` a corpus that is begun; StorageError if it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / PLAN_FILE, plan_to_json(plan))
        remove_leftovers(out)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror})") from None


def plan_from_json(path: Place) -> Plan:
    """A plan that `plan_to_json` wrote to `path`."""
    tree: dict[str, Any] = json.loads(path.read_text())
    return Plan(
        build(CorpusConfig, tree["config"], str(path)),
        tuple(SourceFile(*f) for f in tree["files"]),
        tuple(tuple(Piece(*p) for p in pieces) for pieces in tree["shards"]),
        tree["request"],
        tree["duplicates"],
    )
