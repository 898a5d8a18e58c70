"""Reading a tokenised corpus: whole in memory if it fits a budget, else through a bounded cache of chunks."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bertgpt_jax.config import fingerprint
from bertgpt_jax.corpus.kinds import load_tokenizer
from bertgpt_jax.corpus.places import BucketPath, Place, array_context, find_place
from bertgpt_jax.corpus.special import SpecialIds
from bertgpt_jax.corpus.store import (
    ARRAYS,
    CHUNK,
    DOCUMENT_ARRAYS,
    DTYPES,
    ShardArrays,
    content_sha256,
    shard_name,
    token_dtype,
)
from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.corpus.view import (
    SENTENCE_START,
    SPLITS,
    WORD_START,
    Corpus,
    InMemoryCorpus,
    ragged_index,
    shard_bases,
)
from bertgpt_jax.errors import DataError, StorageError

__all__ = ["SENTENCE_START", "SPLITS", "WORD_START", "Corpus", "CorpusReader", "InMemoryCorpus", "read_manifest"]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_OPEN_SHARDS = 256


def read_manifest(path: str | Place) -> dict[str, Any]:
    """The manifest of a tokenised corpus, its version checked.

    Raises:
        DataError: there is none, it is damaged, or of a newer format.
    """
    file = find_place(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is no finished corpus: {MANIFEST} is missing; run prepare (again)") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{file}: damaged ({error}); prepare the corpus again") from None
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version") if isinstance(manifest, dict) else None
        raise DataError(f"{file}: format_version {version!r}; this program reads {FORMAT_VERSION}")
    return manifest


def content_fingerprint(manifest: dict[str, Any]) -> str:
    """sha256 (hex) of what a corpus holds, wherever it came from: shards, splits, tokenizer."""
    columns = manifest["shards"]
    names = ("sha256", "documents", "train_documents", "tokens", "train_tokens")
    return fingerprint([FORMAT_VERSION, manifest["tokenizer"]["sha256"], [columns[name] for name in names]])


class CorpusReader(Corpus):
    """A tokenised corpus on disk (`corpus/view.py` says what it offers); safe to use from several threads.

    Args:
        path: the corpus directory, or its address in a bucket.
        memory_budget: bytes. Tokens that fit (and flags, if they fit as well) are read whole at first use; else decoded
            chunks are cached, least recently used out first.

    Raises:
        DataError: no manifest, shards missing, tokenizer or content other than the manifest says.
    """

    def __init__(self, path: str | Place, memory_budget: int = 2 << 30):
        self.path = find_place(path)
        self.manifest = read_manifest(self.path)
        columns = {name: values for name, values in self.manifest["shards"].items() if name != "sha256"}
        self._shards = {name: np.array(values, np.int64) for name, values in columns.items()}
        self.documents, self.train_documents = self._shards["documents"], self._shards["train_documents"]
        self.tokens, self.train_tokens = self._shards["tokens"], self._shards["train_tokens"]
        self.token_base = shard_bases(self.tokens)
        self.vocab_size = int(self.manifest["tokenizer"]["vocab_size"])
        self.special = SpecialIds(**self.manifest["tokenizer"]["special"])
        self.fingerprint = str(self.manifest["fingerprint"])
        if content_fingerprint(self.manifest) != self.fingerprint:
            raise DataError(f"{self.path / MANIFEST}: fingerprint and shards disagree; prepare the corpus again")
        self._check_present()
        self._context = array_context(cache_bytes=0)
        self._opened: OrderedDict[int, ShardArrays] = OrderedDict()
        self._lock = threading.RLock()
        token_bytes = int(self.token_base[-1]) * token_dtype(self.vocab_size).itemsize
        flag_bytes = int(self.token_base[-1])
        self._sources = {
            "tokens": self._source("tokens", token_bytes <= memory_budget, memory_budget * 2 // 3),
            "flags": self._source("flags", token_bytes + flag_bytes <= memory_budget, memory_budget // 3),
        }

    def _source(self, name: str, fits: bool, budget: int) -> _Resident | _Cached:
        return _Resident(self, name) if fits else _Cached(self, name, budget)

    def _check_present(self) -> None:
        if isinstance(self.path, BucketPath):  # a listing may take minutes; a missing shard is found when it is opened
            return
        try:
            present = set(os.listdir(self.path))
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read ({error.strerror})") from None
        head, _, tail = shard_name(0, self.num_shards).partition("00000")
        numbers = (name[len(head) : -len(tail)] for name in present if name.startswith(head) and name.endswith(tail))
        if sum(number.isdigit() for number in numbers) == self.num_shards:
            return  # of 100,000 shards, counting takes a fifth of the time of looking up each
        names = [shard_name(i, self.num_shards) for i in range(self.num_shards)]
        missing = [name for name in names if name not in present]
        if missing:
            count = f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:5])}"
            raise DataError(f"{self.path}: {count}; prepare the corpus again")

    @property
    def rows_directory(self) -> Path | None:
        """Where indices over the corpus are kept beside it; None in a bucket: there they are made anew."""
        return None if isinstance(self.path, BucketPath) else self.path / "rows"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was made with, its files compared with the manifest's sha256."""
        tokenizer = load_tokenizer(self.path / "tokenizer")
        wanted = self.manifest["tokenizer"]["sha256"]
        if tokenizer.sha256 != wanted:
            found = f"sha256 {tokenizer.sha256[:12]} where the manifest has {wanted[:12]}"
            raise DataError(f"{self.path / 'tokenizer'}: {found}; prepare the corpus again")
        if (tokenizer.vocab_size, tokenizer.special) != (self.vocab_size, self.special):
            found = f"vocab_size {self.vocab_size} and {self.special}; the tokenizer has {tokenizer.vocab_size} and"
            raise DataError(f"{self.path / MANIFEST}: {found} {tokenizer.special}; prepare the corpus again")
        return tokenizer

    def shard(self, index: int) -> ShardArrays:
        """The arrays of one shard."""
        with self._lock:
            if index not in self._opened:
                directory = self.path / shard_name(index, self.num_shards)
                self._check_shard(directory, index)
                lengths = dict.fromkeys(DOCUMENT_ARRAYS, int(self.documents[index]))
                lengths |= dict.fromkeys(("tokens", "flags"), int(self.tokens[index]))
                self._opened[index] = ShardArrays(directory, lengths, self._context)
            self._opened.move_to_end(index)
            if len(self._opened) > _OPEN_SHARDS:
                self._opened.popitem(last=False)
            return self._opened[index]

    def _check_shard(self, directory: Place, index: int) -> None:
        """That a directory holds the shard the manifest means, not another one under its name."""
        try:
            found = json.loads((directory / "done.json").read_text()).get("sha256")
        except (OSError, ValueError):
            raise DataError(f"{directory / 'done.json'}: missing or damaged; prepare the corpus again") from None
        if found != self.manifest["shards"]["sha256"][index]:
            raise DataError(f"{directory} holds another shard than the manifest says; prepare the corpus again")

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self._sources["tokens"].gather(starts, lengths).astype(np.int32)

    def gather_flags(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self._sources["flags"].gather(starts, lengths)

    def document_spans(self, shard: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        before, hi = max(lo - 1, 0), min(hi, int(self.documents[shard]))
        ends = self.shard(shard).read("doc_end", before, hi)
        starts = np.zeros(1, np.int64) if lo == 0 else ends[:1] + 1
        ends = ends[lo - before :]
        base = self.token_base[shard]
        return np.concatenate([starts, ends[:-1] + 1])[: hi - lo] + base, ends + base

    def document_bytes(self, shard: int, lo: int, hi: int) -> np.ndarray:
        return self.shard(shard).read("doc_bytes", lo, hi)

    def document_origin(self, shard: int, index: int) -> tuple[str, int]:
        arrays = self.shard(shard)
        source = int(arrays.read("doc_source", index, index + 1)[0])
        return self.manifest["sources"]["name"][source], int(arrays.read("doc_offset", index, index + 1)[0])

    def split_bytes(self, split: str) -> int:
        self.split_documents(split)
        train = int(self._shards["train_bytes"].sum())
        return train if split == "train" else int(self._shards["bytes"].sum()) - train

    def verify(self) -> None:
        """Reads every shard and compares it with its sha256; DataError names the first that differs."""
        for index, wanted in enumerate(self.manifest["shards"]["sha256"]):
            arrays = {name: self.shard(index).read(name) for name in ARRAYS}
            if content_sha256(arrays) != wanted:
                name = shard_name(index, self.num_shards)
                raise DataError(f"{self.path / name}: content differs from its sha256; prepare the corpus again")


class _Resident:
    """An array of all shards in memory, read at first use."""

    def __init__(self, reader: CorpusReader, name: str):
        self._reader, self._name = reader, name

    @cached_property
    def _values(self) -> np.ndarray:
        reader = self._reader
        with reader._lock:
            dtype = token_dtype(reader.vocab_size) if self._name == "tokens" else np.dtype(DTYPES[self._name])
            values = np.empty(int(reader.token_base[-1]), dtype)
            for shard in range(reader.num_shards):
                lo, hi = reader.token_base[shard : shard + 2]
                if hi > lo:
                    values[lo:hi] = reader.shard(shard).read(self._name)
            return values

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self._values.take(ragged_index(starts, lengths))


class _Cached:
    """An array of all shards behind a cache of decoded chunks.

    A span is cut where it crosses a chunk; each piece then is (slot of the cache, offset, length), and one ragged index
    gathers all pieces.
    """

    def __init__(self, reader: CorpusReader, name: str, budget: int):
        self._reader, self._name = reader, name
        dtype = token_dtype(reader.vocab_size) if name == "tokens" else np.dtype(DTYPES[name])
        self._chunk_base = shard_bases(-(-reader.tokens // CHUNK))
        slots = min(max(16, budget // (CHUNK * dtype.itemsize)), int(self._chunk_base[-1]))
        self._buffer = np.empty((slots, CHUNK), dtype)
        self._slot: OrderedDict[int, int] = OrderedDict()

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        chunks, offsets, sizes = self._pieces(starts, lengths)
        parts = []
        with self._reader._lock:
            for lo, hi in self._rounds(chunks):
                slots = self._fetch(chunks[lo:hi])
                flat = ragged_index(slots * CHUNK + offsets[lo:hi], sizes[lo:hi])
                parts.append(self._buffer.reshape(-1).take(flat))
        return np.concatenate(parts) if parts else np.empty(0, self._buffer.dtype)

    def _pieces(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Global chunk number, offset in it and length of the pieces of all spans, in order."""
        base = self._reader.token_base
        keep = lengths > 0
        starts, lengths = starts[keep], lengths[keep]
        shard = np.searchsorted(base, starts, "right") - 1
        local = starts - base[shard]
        last_shard = np.searchsorted(base, starts + lengths - 1, "right") - 1
        if (shard != last_shard).any():
            raise DataError("a span crosses the end of a shard")
        first = local // CHUNK
        count = (local + lengths - 1) // CHUNK - first + 1
        row = np.repeat(np.arange(len(starts)), count)
        chunk = ragged_index(first, count)
        lo = np.maximum(chunk * CHUNK, local[row])
        hi = np.minimum((chunk + 1) * CHUNK, (local + lengths)[row])
        return chunk + self._chunk_base[shard[row]], lo - chunk * CHUNK, hi - lo

    def _rounds(self, chunks: np.ndarray) -> list[tuple[int, int]]:
        """Runs of pieces whose chunks fit into the cache together."""
        if len(chunks) <= len(self._buffer):
            return [(0, len(chunks))] if len(chunks) else []
        if len(np.unique(chunks)) <= len(self._buffer):
            return [(0, len(chunks))]
        step = len(self._buffer)
        return [(lo, min(lo + step, len(chunks))) for lo in range(0, len(chunks), step)]

    def _fetch(self, chunks: np.ndarray) -> np.ndarray:
        """Slots of the chunks, reading those that are not cached."""
        distinct, inverse = np.unique(chunks, return_inverse=True)
        missing = []
        for chunk in distinct.tolist():
            if chunk in self._slot:
                self._slot.move_to_end(chunk)
            else:
                missing.append(chunk)
        by_shard: dict[int, list[int]] = {}
        for chunk in missing:
            shard = int(np.searchsorted(self._chunk_base, chunk, "right")) - 1
            by_shard.setdefault(shard, []).append(chunk)
        for shard, wanted in by_shard.items():
            self._read(shard, wanted)
        return np.array([self._slot[chunk] for chunk in distinct.tolist()], np.int64)[inverse]

    def _read(self, shard: int, wanted: list[int]) -> None:
        size, base = int(self._reader.tokens[shard]), int(self._chunk_base[shard])
        ranges = [((c - base) * CHUNK, min((c - base + 1) * CHUNK, size)) for c in wanted]
        for chunk, values in zip(wanted, self._reader.shard(shard).read_many(self._name, ranges), strict=True):
            full = len(self._slot) >= len(self._buffer)
            slot = self._slot.popitem(last=False)[1] if full else len(self._slot)
            self._buffer[slot, : len(values)] = values
            self._slot[chunk] = slot
