"""Models written as JSON in minGPT's layout (karpathy/minGPT names, [output, input] matrices, base64 fp32)."""

from __future__ import annotations

import base64
import binascii
import gzip
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bertgpt_jax.config import parse_json
from bertgpt_jax.corpus.special import SpecialIds
from bertgpt_jax.errors import DataError, StorageError
from bertgpt_jax.transfer import hf_gpt2
from bertgpt_jax.transfer.family import need
from bertgpt_jax.transfer.hf_directory import check_tensors, reader
from bertgpt_jax.transfer.source import Source, parameter_shapes
from bertgpt_jax.transfer.workdir import model_config

MAX_BYTES = 1 << 30
NAMES = partial(hf_gpt2.names, layout="linear")
"""GPT-2's table with torch.nn.Linear matrices."""


def read_tensors(path: Path) -> dict[str, Any]:
    """The JSON of a file (`.json` or `.json.gz`): `config`, and name -> fp32 array for the rest.

    Raises:
        DataError: no such JSON, or a tensor whose bytes are not those of its shape. StorageError: unreadable.
    """
    try:
        opened = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
        with opened as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, EOFError) as error:
        raise StorageError(f"{path} cannot be read ({error})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8") from None
    if len(data) > MAX_BYTES:
        raise DataError(f"{path} holds more than {MAX_BYTES:,} bytes")
    tree = parse_json(text, str(path))
    if not isinstance(tree, dict):
        raise DataError(f"{path} holds {type(tree).__name__}, not an object")
    return {name: entry if name == "config" else _array(entry, name, path) for name, entry in tree.items()}


def _array(entry: Any, name: str, path: Path) -> np.ndarray:
    try:
        shape, kind, data = [int(n) for n in entry["shape"]], entry["dtype"], base64.b64decode(entry["data"])
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise DataError(f"{path}: '{name}' has no shape, dtype and base64 data") from None
    if kind != "torch.float32" or len(data) != 4 * math.prod(shape) or min(shape, default=0) < 0:
        raise DataError(f"{path}: '{name}' claims {kind}{shape} but has {len(data):,} bytes")
    return np.frombuffer(data, "<f4").reshape(shape)


def open_mingpt(path: Path) -> Source:
    """The parameters of such a file; it has no tokenizer.

    Raises:
        DataError: damaged, or not this layout.
    """
    tensors = read_tensors(path)
    tree = tensors.pop("config", None)
    if not isinstance(tree, dict):
        raise DataError(f"{path}: no 'config' object; this is no model in minGPT's layout")
    sizes = need(tree, dict.fromkeys(("n_layer", "n_head", "n_embd", "vocab_size", "block_size"), int), str(path))
    settings = {
        "n_positions": sizes["block_size"],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        **{name: tree[name] for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop") if name in tree},
    }
    config = model_config(hf_gpt2.from_config({**sizes, **settings}, set(tensors)), str(path))
    leaves, rows = parameter_shapes(config), NAMES(config, SpecialIds())
    shapes = {name: array.shape for name, array in tensors.items()}
    check_tensors(hf_gpt2.GPT2, config, rows, leaves, shapes, str(path))
    return Source(config, None, leaves, reader(rows, leaves, tensors.__getitem__), str(path), None, {})
