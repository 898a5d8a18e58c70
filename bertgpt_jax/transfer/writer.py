"""Writing safetensors files tensor by tensor: no file is ever held in memory.

`safetensors.serialize` wants all tensors of a file at once. The format is an 8-byte length, a JSON header and the data,
so the header is written first and each tensor into its place, in any order; the library reads them back (`proof.py`).
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from bertgpt_jax.transfer.tensors import INDEX, SINGLE

Shapes = dict[str, tuple[int, ...]]
CODES = {"float32": "F32", "bfloat16": "BF16"}
DEFAULT_SHARD_BYTES = 5_000_000_000


def plan_shards(shapes: Shapes, itemsize: int, limit: int) -> list[Shapes]:
    """Tensors in order, a new file where the next would make one larger than `limit` bytes."""
    shards: list[Shapes] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * itemsize
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    return shards


class TensorWriter:
    """The safetensors files of one export, made at their full size and filled in any order.

    Args:
        directory: where; it exists.
        shapes: tensor name -> shape, all of `dtype`.
        dtype: `float32` or `bfloat16`.
        limit: bytes of tensors in a file; a tensor larger than that gets a file of its own.

    Raises:
        OSError: no space for them; nothing of a tensor is written then.
    """

    def __init__(self, directory: Path, shapes: Shapes, dtype: str, limit: int):
        self.dtype = jnp.dtype(dtype)
        self._places: dict[str, tuple[Path, int, tuple[int, ...]]] = {}
        shards = plan_shards(shapes, self.dtype.itemsize, limit)
        self.files = [directory / SINGLE]
        if len(shards) > 1:
            self.files = [directory / f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        for path, shard in zip(self.files, shards, strict=True):
            self._begin(path, shard)
        self.total_bytes = sum(int(np.prod(shape)) for shape in shapes.values()) * self.dtype.itemsize
        if len(shards) > 1:
            names = {name: self._places[name][0].name for name in shapes}
            tree = {"metadata": {"total_size": self.total_bytes}, "weight_map": names}
            (directory / INDEX).write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", "utf-8")

    def _begin(self, path: Path, shard: Shapes) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shard.items():
            begin, end = end, end + int(np.prod(shape)) * self.dtype.itemsize
            header[name] = {"dtype": CODES[self.dtype.name], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.flush()
            if hasattr(os, "posix_fallocate"):  # a hole that cannot be filled later would kill the process (SIGBUS)
                os.posix_fallocate(file.fileno(), 0, start + end)
            else:
                file.truncate(start + end)
        for name, shape in shard.items():
            self._places[name] = path, start + header[name]["data_offsets"][0], shape  # type: ignore[index]

    def put(self, name: str, region: tuple[slice, ...], array: np.ndarray) -> None:
        """Writes `array`, cast to the export's dtype, into a region of a tensor."""
        path, offset, shape = self._places[name]
        place = np.memmap(path, self.dtype, "r+", offset, shape)
        place[region] = array.astype(self.dtype, copy=False)

    def finish(self) -> None:
        """Returns when all is on the disk, and lets the cache go: what is read back then comes from there."""
        for path in self.files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
