"""Plain arrays by our parameter paths, for programs that want nothing but NumPy."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from bertgpt_jax.corpus.kinds import load_tokenizer
from bertgpt_jax.errors import DataError, StorageError
from bertgpt_jax.transfer.source import ProofFailed, Source, check_vocabulary, parameter_shapes
from bertgpt_jax.transfer.target import building, write_json
from bertgpt_jax.transfer.tensors import read_json
from bertgpt_jax.transfer.workdir import model_config

ARRAYS, MODEL = "params.npz", "model.json"


def export_npz(source: Source, out: str, dtype: str = "float32", *, stacked: bool = True) -> int:
    """Writes `params.npz` (path -> array), `model.json` (the config) and the tokenizer.

    NumPy has no bfloat16: such arrays are stored as their uint16 bits (`array.view(ml_dtypes.bfloat16)`).

    Args:
        stacked: one array for all layers (`layers/attention/query/kernel`), as in checkpoints; else one array a layer
            (`layers/0/attention/query/kernel`).

    Returns:
        how many arrays.

    Raises:
        ConfigError, StorageError: `out` cannot be made. ProofFailed: an array read back differs.
    """
    size = sum(math.prod(shape) for _, shape in source.leaves.values()) * jnp.dtype(dtype).itemsize
    with building(out, source.label.partition(", step")[0], size + (1 << 20)) as work:
        count = write_arrays(source, work, dtype, stacked=stacked)
        tree = {"dtype": dtype, "step": source.step, "model": source.model_config.model_dump(mode="json")}
        write_json(work / MODEL, tree)
        if source.tokenizer is not None:
            source.tokenizer.save(work / "tokenizer")
    return count


def write_arrays(source: Source, directory: Path, dtype: str, *, stacked: bool = True) -> int:
    """Writes `params.npz` array by array, compares what comes back, and returns how many there are.

    Raises:
        ProofFailed: naming the first array that differs.
    """

    def stored(path: str) -> dict[str, np.ndarray]:
        array = source.read([path])[path].astype(jnp.dtype(dtype))
        array = np.ascontiguousarray(array.view(np.uint16) if dtype == "bfloat16" else array)
        head, _, rest = path.partition("/")
        if stacked or head != "layers":
            return {path: array}
        return {f"layers/{i}/{rest}": array[i] for i in range(len(array))}

    with zipfile.ZipFile(directory / ARRAYS, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for path in source.leaves:
            for name, array in stored(path).items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
    with np.load(directory / ARRAYS, allow_pickle=False) as back:
        for path in source.leaves:
            for name, array in stored(path).items():
                if not np.array_equal(_bits(back[name]), _bits(array)):
                    raise ProofFailed(f"'{name}' read back differs from {source.label}")
        return len(back.files)


def open_npz(directory: Path) -> Source:
    """What `export_npz` wrote, stacked or not; bfloat16 becomes fp32.

    Raises:
        DataError: damaged, or arrays that are not the model's. StorageError: unreadable.
    """
    tree = read_json(directory / MODEL)
    config = model_config(tree.get("model") or {}, str(directory / MODEL))
    leaves = parameter_shapes(config)
    try:
        arrays = np.load(directory / ARRAYS, allow_pickle=False)
        names = set(arrays.files)
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{directory / ARRAYS} is damaged ({error})") from None
    except OSError as error:
        raise StorageError(f"{directory / ARRAYS} cannot be read ({error})") from None
    split = "layers/0/attention/query/kernel" in names

    def one(name: str) -> np.ndarray:
        try:
            array = arrays[name]
        except (KeyError, ValueError, zipfile.BadZipFile, EOFError):
            raise DataError(f"{directory / ARRAYS}: '{name}' is missing or damaged") from None
        return (array.view(jnp.bfloat16) if tree.get("dtype") == "bfloat16" else array).astype(np.float32)

    def read(paths: Sequence[str]) -> dict[str, np.ndarray]:
        found = {}
        for path in paths:
            head, _, rest = path.partition("/")
            many = [f"layers/{i}/{rest}" for i in range(config.num_layers)] if split and head == "layers" else None
            found[path] = one(path) if many is None else np.stack([one(name) for name in many])
            if found[path].shape != leaves[path][1]:
                raise DataError(f"{directory / ARRAYS}: '{path}' is {found[path].shape}, should be {leaves[path][1]}")
        return found

    folder = directory / "tokenizer"
    tokenizer = load_tokenizer(folder) if folder.is_dir() else None
    check_vocabulary(config, tokenizer, str(directory))
    return Source(config, tokenizer, leaves, read, str(directory), tree.get("step"), {})


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)
