"""Reading the safetensors files of a directory, never trusting what their headers and index say."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from bertgpt_jax.config import parse_json
from bertgpt_jax.errors import ConfigError, DataError, StorageError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.ckpt.index", "tf_model.h5", "flax_model.msgpack")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Element types that weights may have; F64 and integers are no weights of these models."""

MAX_HEADER_BYTES = 100 << 20
"""The format's own limit."""

_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


class TensorFiles:
    """The tensors of a directory by name.

    Attributes:
        shapes: name -> (dtype name, shape).

    Raises:
        ConfigError: no safetensors files there (pickles are refused, with the command that converts them).
        DataError: a file is damaged or no safetensors; a shard is missing; the index names files outside.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._where: dict[str, str] = {}
        self.shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        promised = _index(directory)
        for file in sorted(set(promised.values())) or [SINGLE]:
            self._open(file)
        lacking = sorted(name for name, file in promised.items() if self._where.get(name) != file)
        if lacking:
            raise DataError(
                f"{directory / INDEX} promises {len(lacking)} tensors that its shards do not hold ('{lacking[0]}' in "
                f"'{promised[lacking[0]]}'); fetch the directory again"
            )

    def _open(self, file: str) -> None:
        path = self.directory / file
        check_header(path)
        try:
            opened = safe_open(path, framework="numpy")
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                view = opened.get_slice(name)
                dtype = view.get_dtype()
                if dtype not in DTYPES:
                    raise DataError(f"{path}: tensor '{name}' is of type {dtype}; known: {', '.join(DTYPES)}")
                if name in self._where:
                    raise DataError(f"{path}: tensor '{name}' stands in '{self._where[name]}' already")
                self._where[name] = file
                self.shapes[name] = DTYPES[dtype], tuple(view.get_shape())
        except SafetensorError as error:
            raise DataError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from None
        except OSError as error:
            raise StorageError(f"{path} cannot be read ({error})") from None

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored; its file is opened anew, because what a mapping has touched stays in memory."""
        with safe_open(self.directory / self._where[name], framework="numpy") as file:
            return file.get_tensor(name)


def _index(directory: Path) -> dict[str, str]:
    """Tensor name -> file name of a sharded directory; {} for a single file."""
    if (directory / SINGLE).is_file():
        return {}
    path = directory / INDEX
    if not path.is_file():
        raise _no_tensors(directory)
    tree = read_json(path)
    names = tree.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
        raise DataError(f"{path}: no weight_map from tensors to files")
    for file in sorted(set(names.values())):
        if Path(file).name != file or file in (".", "..") or "\\" in file or not file.endswith(".safetensors"):
            raise DataError(f"{path}: shard '{file}' is not the name of a .safetensors file in the directory")
        if not (directory / file).is_file():
            raise DataError(f"{path}: shard '{file}' is missing; fetch the directory again")
    return names


def _no_tensors(directory: Path) -> ConfigError:
    pickles = [name for name in PICKLES if (directory / name).exists()]
    if not pickles:
        return ConfigError(f"'{directory}' holds neither {SINGLE} nor {INDEX}; it is no exported model")
    convert = (
        f"python -c \"from transformers import AutoModelForPreTraining as M; M.from_pretrained('{directory}')"
        f".save_pretrained('{directory}-safetensors')\""
    )
    return ConfigError(
        f"'{directory}' holds only {pickles[0]}, which runs code when it is loaded and is not read here; if you trust "
        f"it, convert it with: {convert}"
    )


def check_header(path: Path) -> None:
    """Raises DataError if a file's first bytes cannot be those of a safetensors file; reads nothing else."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; fetch the directory again") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror})") from None
    if start.startswith(_PICKLE_STARTS):
        raise DataError(f"{path} is a pickle or zip archive by another name; it is not read, for it could run code")
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if length < 2 or length > size - 8 or length > MAX_HEADER_BYTES:
        raise DataError(
            f"{path} is no safetensors file or is cut short: its header claims {length:,} bytes (the limit is "
            f"{MAX_HEADER_BYTES:,}), the file has {size:,}; fetch it again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's directory; at most 64 MB.

    Raises:
        ConfigError, DataError: missing, no JSON, no object.
    """
    try:
        if path.stat().st_size > 64 << 20:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; that is no description of a model")
        tree = parse_json(path.read_text("utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"'{path.parent}' has no {path.name}; it is no exported model") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror})") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path} holds {type(tree).__name__}, not an object")
    return tree
