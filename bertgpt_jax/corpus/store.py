"""A shard on disk: zarr3 arrays written and read with TensorStore, and `done.json`, written last.

    shard-00002-of-00008/
      tokens/      uint16 or uint32, ids of all documents, one terminator after each
      flags/       uint8 per token: word start, sentence start
      doc_end/     int64 per document: end of its tokens, exclusive, terminator not counted
      doc_bytes/   int64: UTF-8 bytes of its cleaned text
      doc_source/  int32: row of the manifest's sources
      doc_offset/  int64: where in its source it starts (bytes, uncompressed; in a table, its row)
      doc_hash/    uint64: first 8 bytes of the blake2b of its text
      done.json    counts, sha256 over the arrays' content

Arrays are cut into inner chunks of 8,192 values with a crc32c each: a flipped bit is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import numpy as np
import tensorstore

from bertgpt_jax.corpus.places import SHARED, BucketPath, Place, kvstore, write_whole
from bertgpt_jax.errors import DataError, StorageError

CHUNK = 8192
_SHARD_CHUNKS = 512
DOCUMENT_ARRAYS = ("doc_end", "doc_bytes", "doc_source", "doc_offset", "doc_hash")
ARRAYS = ("tokens", "flags", *DOCUMENT_ARRAYS)
DTYPES = {"flags": "uint8", "doc_end": "int64", "doc_bytes": "int64", "doc_source": "int32", "doc_offset": "int64",
          "doc_hash": "uint64"}  # fmt: skip


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def shard_name(index: int, count: int) -> str:
    """`shard-00002-of-00008`."""
    return f"shard-{index:05d}-of-{count:05d}"


def content_sha256(arrays: dict[str, np.ndarray]) -> str:
    """Hex digest over names, types and little-endian values of a shard's arrays."""
    digest = hashlib.sha256()
    for name in ARRAYS:
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}:{array.dtype.name}:{len(array)}:".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()


def write_shard(directory: Place, arrays: dict[str, np.ndarray], row: dict) -> None:
    """Writes a shard to a temporary directory beside `directory`, then renames it: it is there whole or not at all.

    `row` goes to `done.json` with the arrays' sha256. Where another process has finished the same shard meanwhile,
    its copy stays. In a bucket the arrays are written where they stay, and `done.json` makes them a shard.
    """
    if isinstance(directory, BucketPath):
        _write_objects(directory, arrays, row)
        return
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for name in ARRAYS:
            _create(temporary / name, arrays[name])
        done = row | {"sha256": content_sha256(arrays)}
        with open(temporary / "done.json", "w") as stream:
            stream.write(json.dumps(done, sort_keys=True) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.rename(temporary, directory)
        except OSError:
            if read_done(directory) is None:
                raise
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"{directory}: cannot be written ({error.strerror or error})") from None


def _write_objects(directory: BucketPath, arrays: dict[str, np.ndarray], row: dict) -> None:
    try:
        for name in ARRAYS:
            _create(directory / name, arrays[name])
    except OSError as error:
        raise StorageError(f"{directory}: cannot be written ({error.strerror})") from None
    done = row | {"sha256": content_sha256(arrays)}
    write_whole(directory / "done.json", json.dumps(done, sort_keys=True) + "\n")


def read_done(directory: Place) -> dict | None:
    """The row of a finished shard; None if it is not there or not whole."""
    try:
        row = json.loads((directory / "done.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(row, dict) or "sha256" not in row:
        return None
    if isinstance(directory, BucketPath):  # it was written after everything else
        return row
    return row if all((directory / name / "zarr.json").is_file() for name in ARRAYS) else None


def _create(path: Place, array: np.ndarray) -> None:
    """A one-dimensional zarr3 array: outer chunks (files) of up to 4M values, inner chunks of 8,192."""
    chunks = min(_SHARD_CHUNKS, max(1, -(-len(array) // CHUNK)))
    raw = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    if array.dtype.itemsize == 1:
        raw[0] = {"name": "bytes"}
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [CHUNK], "codecs": raw, "index_codecs": index}
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore(path),
        "metadata": {
            "shape": [len(array)],
            "data_type": array.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [CHUNK * chunks]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
        "create": True,
        "open": True,  # in a bucket another process may be writing the same values
    }
    try:
        target = tensorstore.open(spec, context=SHARED).result()
        if len(array):
            target.write(array).result()
    except ValueError as error:
        raise OSError(None, str(error).splitlines()[0]) from None


class ShardArrays:
    """The arrays of one shard, opened when first read.

    Raises (all methods):
        DataError: an array is missing, has another length than the manifest says, or fails its checksum.
    """

    def __init__(self, directory: Place, lengths: dict[str, int], context: tensorstore.Context):
        self._directory, self._lengths, self._context = directory, lengths, context
        self._open: dict[str, tensorstore.TensorStore] = {}

    def _array(self, name: str) -> tensorstore.TensorStore:
        if name not in self._open:
            try:
                found = tensorstore.open(
                    {"driver": "zarr3", "kvstore": kvstore(self._directory / name), "recheck_cached_data": False},
                    open=True, read=True, context=self._context,
                ).result()  # fmt: skip
            except ValueError as error:
                raise DataError(f"{self._directory / name}: cannot be opened ({_first_line(error)})") from None
            if found.shape != (self._lengths[name],):
                rule = f"{found.shape[0]:,} values, the manifest says {self._lengths[name]:,}"
                raise DataError(f"{self._directory / name}: {rule}; prepare the corpus again")
            self._open[name] = found
        return self._open[name]

    def read(self, name: str, lo: int = 0, hi: int | None = None) -> np.ndarray:
        """Values `[lo, hi)` of an array."""
        return self.read_many(name, [(lo, self._lengths[name] if hi is None else hi)])[0]

    def read_many(self, name: str, ranges: list[tuple[int, int]]) -> list[np.ndarray]:
        """Values of several ranges, read concurrently."""
        array = self._array(name)
        try:
            with tensorstore.Batch() as batch:
                futures = [array[lo:hi].read(batch=batch) for lo, hi in ranges]
            return [np.asarray(future.result()) for future in futures]
        except ValueError as error:
            raise DataError(f"{self._directory / name}: damaged ({_first_line(error)}); prepare it again") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
