"""Equal documents of a whole source: all but the first are found, in bounded memory, before any is tokenised.

Every shard writes the 128-bit hashes of its documents, sorted. Then equal hashes of all shards are brought together, a
range of the hash space at a time, and of each group the document that comes first in the source stays. What is dropped
depends on neither the shards nor the number of workers, nor on interruptions: each file is written whole or not at all.

    OUT/.hashes/shard-00002-of-00008.npy      uint64[3, documents]: both halves of the hash, number in the shard
    OUT/.duplicates/shard-00002-of-00008      int64, little-endian: numbers of the documents to drop, in no order
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bertgpt_jax.corpus.plan import Plan
from bertgpt_jax.corpus.pool import Pool
from bertgpt_jax.corpus.shards import check_sources, cleaned_documents
from bertgpt_jax.corpus.store import shard_name
from bertgpt_jax.errors import StorageError

HASHES = ".hashes"
DUPLICATES = ".duplicates"
_ROW_BYTES = 24
_RANGE_BYTES = 48 << 20
"""Rows of one range of hashes held at a time; sorting them takes about four times as much."""


def ensure_duplicates(plan: Plan, out: Path, pool: Pool | None, report: Callable[[str], None]) -> None:
    """Makes `.duplicates` in `out` if it is not there yet, from the hashes that are there and those still missing."""
    if (out / DUPLICATES).is_dir():
        return
    started = time.monotonic()
    (out / HASHES).mkdir(exist_ok=True)
    missing = [i for i in range(len(plan.shards)) if not _hash_file(plan, i, out).is_file()]
    if pool is None:
        for index in missing:
            hash_shard(plan, index, out)
    else:
        for _ in pool.run(({"hash": i} for i in missing), lambda answer: "done" in answer):
            pass
    find_duplicates(plan, out)
    report(f"duplicates: looked for among all documents, {time.monotonic() - started:.1f} s")


def hash_shard(plan: Plan, index: int, out: Path) -> None:
    """Writes the hashes of the documents of a shard that cleaning and the other filters leave."""
    digests, numbers = bytearray(), []
    for number, _, _, text in cleaned_documents(plan, index, Counter()):
        digests += hashlib.blake2b(text.encode(), digest_size=16).digest()
        numbers.append(number)
    check_sources(plan, index)
    rows = np.empty((3, len(numbers)), np.uint64)
    rows[:2] = np.frombuffer(bytes(digests), "<u8").reshape(-1, 2).T
    rows[2] = numbers
    target = _hash_file(plan, index, out)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.npy")
    try:
        np.save(temporary, rows[:, np.lexsort(rows[::-1])])
        os.replace(temporary, target)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror or error})") from None


def find_duplicates(plan: Plan, out: Path, range_bytes: int = _RANGE_BYTES) -> None:
    """Writes `.duplicates` from the hashes of all shards.

    Args:
        range_bytes: how much of the hashes is looked at together.
    """
    target = out / DUPLICATES
    temporary = target.with_name(f"{DUPLICATES}.{os.getpid()}")
    shards = range(len(plan.shards))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        files = [temporary / shard_name(i, len(plan.shards)) for i in shards]
        for file in files:
            file.touch()
        hashes = [np.load(_hash_file(plan, i, out), mmap_mode="r") for i in shards]
        count = sum(rows.shape[1] for rows in hashes)
        bits = max(0, (count * _ROW_BYTES // range_bytes).bit_length())
        starts = np.array([i << (64 - bits) for i in range(1 << bits)], np.uint64)
        cuts = [[*np.searchsorted(rows[0], starts).tolist(), rows.shape[1]] for rows in hashes]
        for part in range(1 << bits):
            spans = [slice(*cut[part : part + 2]) for cut in cuts]
            rows = np.concatenate([h[:, span] for h, span in zip(hashes, spans, strict=True)], axis=1)
            shard = np.repeat(np.arange(len(hashes)), [span.stop - span.start for span in spans])
            for index, numbers in _later_ones(rows, shard):
                with open(files[index], "ab") as stream:
                    stream.write(numbers.astype("<i8").tobytes())
        os.rename(temporary, target)
    except (OSError, ValueError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"{target}: cannot be made ({error}); delete {out} and prepare again") from None


def _later_ones(rows: np.ndarray, shard: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(shard, numbers of documents) of rows that have an equal one before them.

    Rows come shard by shard, those of equal hashes in a shard by number, and the sort keeps the order of equal ones.
    """
    order = np.lexsort((rows[1], rows[0]))
    equal = (rows[0][order[1:]] == rows[0][order[:-1]]) & (rows[1][order[1:]] == rows[1][order[:-1]])
    later = np.sort(order[1:][equal])
    owners, starts = np.unique(shard[later], return_index=True)
    return list(zip(owners.tolist(), np.split(rows[2][later], starts[1:]), strict=False))


def remove_duplicates(out: Path) -> None:
    """Deletes what only the build needed; a bucket never held any."""
    for name in (HASHES, DUPLICATES) if isinstance(out, Path) else ():
        shutil.rmtree(out / name, ignore_errors=True)


def _hash_file(plan: Plan, index: int, out: Path) -> Path:
    return out / HASHES / f"{shard_name(index, len(plan.shards))}.npy"
