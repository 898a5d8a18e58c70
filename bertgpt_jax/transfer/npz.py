"""Plain arrays by our parameter paths, for programs that want nothing but NumPy."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from bertgpt_jax.transfer.proof import ProofFailed
from bertgpt_jax.transfer.source import Source
from bertgpt_jax.transfer.target import building, write_json

ARRAYS = "params.npz"


def export_npz(source: Source, out: str, dtype: str = "float32") -> int:
    """Writes `params.npz` (path -> array, layers stacked), `model.json` (the config) and the tokenizer.

    NumPy has no bfloat16: such arrays are stored as their uint16 bits (`array.view(ml_dtypes.bfloat16)`).

    Returns:
        how many arrays.

    Raises:
        ConfigError, StorageError: `out` cannot be made. ProofFailed: an array read back differs.
    """
    size = sum(math.prod(shape) for _, shape in source.leaves.values()) * jnp.dtype(dtype).itemsize
    with building(out, source.label.partition(", step")[0], size + (1 << 20)) as work:
        write_arrays(source, work, dtype)
        tree = {"dtype": dtype, "step": source.step, "model": source.model_config.model_dump(mode="json")}
        write_json(work / "model.json", tree)
        if source.tokenizer is not None:
            source.tokenizer.save(work / "tokenizer")
    return len(source.leaves)


def write_arrays(source: Source, directory: Path, dtype: str) -> None:
    """Writes `params.npz` array by array and compares what comes back.

    Raises:
        ProofFailed: naming the first array that differs.
    """

    def stored(path: str) -> np.ndarray:
        array = source.read([path])[path].astype(jnp.dtype(dtype))
        return np.ascontiguousarray(array.view(np.uint16) if dtype == "bfloat16" else array)

    with zipfile.ZipFile(directory / ARRAYS, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for path in source.leaves:
            with archive.open(f"{path}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, stored(path), allow_pickle=False)
    with np.load(directory / ARRAYS, allow_pickle=False) as back:
        for path in source.leaves:
            if not np.array_equal(_bits(back[path]), _bits(stored(path))):
                raise ProofFailed(f"'{path}' read back differs from {source.label}")


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)
