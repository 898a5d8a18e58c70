"""The proof of an export: bits against the source, then states, logits and loss against another implementation."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.transfer.family import Family
from bertgpt_jax.transfer.forward import forward
from bertgpt_jax.transfer.hf_directory import reader
from bertgpt_jax.transfer.hf_tokenizer import encode_as_written
from bertgpt_jax.transfer.names import Name, one_layer
from bertgpt_jax.transfer.numpy_reference import IGNORED, Outputs
from bertgpt_jax.transfer.reference import load_outputs
from bertgpt_jax.transfer.source import ModelConfig, ProofFailed, Source, nested
from bertgpt_jax.transfer.tensors import TensorFiles

Reference = Literal["auto", "transformers", "numpy"]

ROWS, LENGTH = 4, 48
"""Size of the batch that is compared (shorter where the model is)."""

TOLERANCE = 1e-5
"""Largest difference, for values up to 1; beyond that relative to the largest value. fp32 has 1.2e-7 a rounding."""

TEXTS = (
    "The quick brown fox jumps over the lazy dog, twice; 3.14159 isn't 22/7.",
    "To be, or not to be: that is the question.\n\tWhether 'tis nobler (in the mind) to suffer?",
    "Naïve café — Straße, 東京 and Москва; emoji 🙂 and a lone é.",
    "",
)
"""What the written tokenizer and ours must cut alike; the first is also among the prompts."""


# ---------------------------------------------------------------- bits


def compare_bits(source: Source, family: Family, rows: Sequence[Name], files: TensorFiles, dtype: str) -> int:
    """Reads every parameter back and compares it with its source, bit by bit; returns how many tensors there are.

    Raises:
        ProofFailed: naming the first tensor that differs, and the layer.
    """
    for row in rows:
        _compare_row(source, row, files, jnp.dtype(dtype))
    for copy, original in family.shared(source.model_config).items():
        if not np.array_equal(files.read(copy), files.read(original)):
            raise ProofFailed(f"'{copy}' read back differs from '{original}', which it repeats")
    for name in family.zeros(source.model_config):
        if files.read(name).any():
            raise ProofFailed(f"'{name}' read back is not zero")
    return len(files.shapes)


def _compare_row(source: Source, row: Name, files: TensorFiles, kind: np.dtype) -> None:
    """One array of ours; a function of its own, at whose end no view keeps it while the next is read."""
    array = source.read([row.ours])[row.ours]
    for i in range(len(array)) if row.stacked else (None,):  # one layer at a time: a copy of all would not fit
        part, name = (array, row.theirs) if i is None else (array[i], row.theirs.format(i=i))
        expected = part[max(row.skipped_rows, 0) :].astype(kind)
        found = row.to_ours(files.read(name)[row.region(part.shape)], part.shape)[max(row.skipped_rows, 0) :]
        if found.dtype != kind or not np.array_equal(_bits(found), _bits(expected)):
            wrong = int(np.sum(found != expected))
            raise ProofFailed(
                f"'{name}' read back differs from {row.ours} of {source.label} in {wrong:,} of {found.size:,} numbers"
            )


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint16 if array.itemsize == 2 else np.uint32)


# ---------------------------------------------------------------- prompts


def make_batch(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, np.ndarray]:
    """A fixed batch: one row of text where there is a tokenizer, rows of ids from the whole vocabulary, ragged."""
    encoder = config.kind == "bert"
    length = min(LENGTH, config.max_positions)
    pad = 0 if tokenizer is None or tokenizer.special.pad is None else tokenizer.special.pad
    if config.kind == "bert" and config.position_offset and tokenizer is None:
        pad = config.position_offset - 1
    ids = (np.arange(ROWS * length, dtype=np.uint64) * np.uint64(2654435761) >> np.uint64(7)) % config.vocab_size
    tokens = ids.astype(np.int32).reshape(ROWS, length)
    tokens[tokens == pad] = (pad + 1) % config.vocab_size  # RoBERTa gives a padding id no position
    if tokenizer is not None:
        text = tokenizer.encode(TEXTS[0])[:length]
        tokens[0, : len(text)] = text
    attention = np.ones_like(tokens)
    if not encoder:
        return {"tokens": tokens, "attention": attention, "labels": tokens.copy()}
    for row in range(1, ROWS):
        attention[row, length - row * length // ROWS :] = 0
    tokens[attention == 0] = pad
    scored = (np.arange(length) % 3 == 1) & (attention == 1)
    types = np.zeros_like(tokens)
    if config.type_vocab_size > 1:
        types[:, length // 2 :] = attention[:, length // 2 :]
    labels = np.where(scored, tokens[:, ::-1] % config.vocab_size, IGNORED)
    next_labels = np.arange(ROWS, dtype=np.int32) % 2
    return {"tokens": tokens, "attention": attention, "labels": labels, "types": types, "next_labels": next_labels}


# ---------------------------------------------------------------- outputs


def choose_reference(reference: Reference) -> Literal["transformers", "numpy"]:
    """transformers with torch where both are installed, else NumPy.

    Raises:
        ConfigError: transformers is asked for and not there.
    """
    there = all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))
    if reference == "transformers" and not there:
        raise ConfigError("--proof transformers needs torch and transformers; run: pip install 'bertgpt_jax[parity]'")
    return "transformers" if there and reference != "numpy" else "numpy"


def run_reference(
    directory: Path, batch: dict[str, np.ndarray], kind: Literal["transformers", "numpy"], layers: int
) -> Outputs:
    """The outputs of another implementation, computed in a process of its own.

    Raises:
        ProofFailed: it cannot load the directory.
    """
    with tempfile.TemporaryDirectory(prefix="bertgpt-proof-") as folder:
        given, result = Path(folder) / "batch.npz", Path(folder) / "outputs.npz"
        np.savez(given, **batch)
        command = [sys.executable, "-m", "bertgpt_jax.transfer.reference", str(directory), str(given), str(result)]
        done = subprocess.run([*command, kind, str(layers)], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ProofFailed(f"{kind} cannot load what was written: {lines[-1]}")
        return load_outputs(result)


def our_outputs(
    source: Source, rows: Sequence[Name], files: TensorFiles, batch: dict[str, np.ndarray], layers: int
) -> Outputs:
    """Our model on the parameters that were read back (and found equal to the source's)."""
    read = reader(rows, source.leaves, files.read)
    stacked = [row for row in rows if row.stacked]

    def layer(i: int) -> dict[str, Any]:
        flat = {}
        for row in stacked:
            shape = one_layer(source.leaves[row.ours][1], row)
            region = files.read(row.theirs.format(i=i))[row.region(shape)].astype(np.float32)
            flat[row.ours.removeprefix("layers/")] = np.ascontiguousarray(row.to_ours(region, shape))
        return nested(flat)

    top = nested(read([row.ours for row in rows if not row.stacked]))
    return forward(source.model_config, top, layer, batch, layers)


def compare_outputs(ours: Outputs, theirs: Outputs, attention: np.ndarray, kind: str) -> dict[str, Any]:
    """Differences, from the embeddings to the loss.

    Args:
        attention: [B, T], 0 where a row is padded; what is computed there is nobody's.

    Raises:
        ProofFailed: naming the first stage at which they are too large.
    """
    if len(ours.hidden) != len(theirs.hidden):
        raise ProofFailed(f"{kind} has {len(theirs.hidden) - 1} layers, ours {len(ours.hidden) - 1}")
    real = attention > 0
    names = ["the embeddings", *(f"layer {i}" for i in range(len(ours.hidden) - 1))]
    stages = [(n, a[real], b[real]) for n, a, b in zip(names, ours.hidden, theirs.hidden, strict=True)]
    stages.append(("the logits", ours.logits[real], theirs.logits[real]))
    if ours.next_logits is not None and theirs.next_logits is not None:
        stages.append(("the next-sentence logits", ours.next_logits, theirs.next_logits))
    stages.append(("the loss", np.float64(ours.loss), np.float64(theirs.loss)))
    worst = {}
    for name, a, b in stages:
        difference, size = float(np.max(np.abs(a - b))), float(np.max(np.abs(b)))
        worst[name] = difference
        if not difference <= TOLERANCE * max(1.0, size):
            raise ProofFailed(
                f"{kind} computes something else from what was written: first at {name}, by {difference:.2e} "
                f"(values up to {size:.2e})"
            )
    return {
        "hidden": max(worst[name] for name, _, _ in stages if name.startswith(("layer", "the embeddings"))),
        "logits": worst["the logits"],
        "next_sentence_logits": worst.get("the next-sentence logits"),
        "loss": {"ours": ours.loss, kind: theirs.loss},
        "top_5_agree": _same_top(ours.logits[real], theirs.logits[real], kind),
    }


def _same_top(ours: np.ndarray, theirs: np.ndarray, kind: str, count: int = 5) -> bool:
    """Whether the best five ids agree everywhere; ids whose logits are equal within the tolerance may change places."""
    count = min(count, ours.shape[-1])
    a, b = (np.argsort(-x, -1, kind="stable")[..., :count] for x in (ours, theirs))
    gap = np.abs(np.take_along_axis(ours, a, -1) - np.take_along_axis(ours, b, -1))
    if gap.max() > 2 * TOLERANCE * max(1.0, float(np.abs(theirs).max())):
        raise ProofFailed(f"{kind} ranks other ids among the best {count}")
    return bool((a == b).all())


# ---------------------------------------------------------------- tokenizer


def compare_tokenizers(directory: Path, tokenizer: Tokenizer) -> int:
    """Encodes fixed texts with tokenizer.json and with ours; returns how many.

    Raises:
        ProofFailed: naming the text.
    """
    for text, theirs in zip(TEXTS, encode_as_written(directory, TEXTS), strict=True):
        ours = tokenizer.encode(text).tolist()
        if theirs != ours:
            raise ProofFailed(f"the written tokenizer cuts {text!r} into {theirs[:12]}, ours into {ours[:12]}")
    return len(TEXTS)


def versions(kind: str) -> dict[str, str]:
    """Versions of the reference's packages."""
    packages = ("transformers", "torch", "safetensors") if kind == "transformers" else ("numpy", "safetensors")
    return {package: importlib.metadata.version(package) for package in packages}
