"""Hugging Face directories as a source of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertgpt_jax.corpus.special import SpecialIds
from bertgpt_jax.errors import ConfigError, DataError, UserError
from bertgpt_jax.transfer.families import FAMILIES
from bertgpt_jax.transfer.family import Family
from bertgpt_jax.transfer.hf_tokenizer import read_tokenizer
from bertgpt_jax.transfer.names import Name, one_layer
from bertgpt_jax.transfer.source import ModelConfig, Source, check_vocabulary, parameter_shapes
from bertgpt_jax.transfer.tensors import TensorFiles, read_json
from bertgpt_jax.transfer.workdir import model_config

CONFIG = "config.json"
OLD_NAMES = {"gamma": "weight", "beta": "bias"}
"""Last parts of names that TensorFlow's checkpoints left behind."""


def open_directory(directory: Path, *, with_tokenizer: bool = True) -> Source:
    """The parameters of a Hugging Face directory of one of our families.

    Names are brought to today's form (`LayerNorm.gamma`, a missing prefix); tied copies may be missing and must agree
    where they are not; what is stored as fp16 or bfloat16 becomes fp32.

    Raises:
        ConfigError: no config.json, a family or setting that is not ours, only pickles.
        DataError: tensors missing, left over, of wrong shapes, damaged; another vocabulary than the tokenizer's.
    """
    tree = read_json(directory / CONFIG)
    kind = tree.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(f"{directory / CONFIG}: model_type {kind!r} is not ours; known: {', '.join(FAMILIES)}")
    family, files = FAMILIES[kind], TensorFiles(directory)
    stored = {modern_name(name, family): name for name in files.shapes}
    try:
        fields = family.from_config(tree, set(stored))
    except UserError as error:
        raise type(error)(f"'{directory}': {error}") from None
    config = model_config(fields, str(directory / CONFIG))
    if config.num_layers > len(files.shapes):  # before a table of that length is made
        raise DataError(
            f"{directory / CONFIG} says {config.num_layers:,} layers, the files beside it hold {len(files.shapes):,} "
            "tensors; they do not belong together: fetch the directory again"
        )
    if config.tied_head:  # some writers keep the copy and drop the original
        copies = family.shared(config).items()
        stored |= {original: stored[copy] for copy, original in copies if copy in stored and original not in stored}
    tokenizer = read_tokenizer(directory) if with_tokenizer else None
    label = str(directory)
    check_vocabulary(config, tokenizer, label)
    shapes = {theirs: files.shapes[name][1] for theirs, name in stored.items()}
    rows = family.names(config, SpecialIds(pad=config.position_offset - 1 if kind == "roberta" else None))
    leaves = parameter_shapes(config)
    check_tensors(family, config, rows, leaves, shapes, label)

    def tensor(name: str) -> np.ndarray:
        return files.read(stored[name])

    if config.tied_head:
        check_copies(family.shared(config), stored, tensor, label)
    return Source(config, tokenizer, leaves, reader(rows, leaves, tensor), label, None, {})


def modern_name(name: str, family: Family) -> str:
    """A tensor's name as transformers 5 writes it."""
    parts = name.split(".")
    parts[-1] = OLD_NAMES.get(parts[-1], parts[-1])
    name = ".".join(parts)
    return name if name.startswith((family.prefix, "cls.", "lm_head.")) else family.prefix + name


def check_tensors(
    family: Family,
    config: ModelConfig,
    rows: Sequence[Name],
    leaves: dict[str, tuple[str, tuple[int, ...]]],
    shapes: dict[str, tuple[int, ...]],
    label: str,
) -> None:
    """Compares the tensors that are there with those that should be.

    Raises:
        DataError: a table of the first ten differences and how many there are.
    """
    expected = expected_shapes(config, rows, leaves)
    optional = {*family.shared(config), *family.zeros(config)}
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    for name, shape in shapes.items():
        if name in expected and shape != expected[name]:
            problems.append(f"{name} is {list(shape)}, should be {list(expected[name])}")
        elif name not in expected and name not in optional and not family.is_ignored(name):
            problems.append(f"{name} {list(shape)} is not of this model")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(
            f"'{label}' is no whole {family.model_type} with its heads, {len(problems)} of {len(expected)} tensors "
            f"differ: {'; '.join(problems[:10])}{more}"
        )


def expected_shapes(
    config: ModelConfig, rows: Sequence[Name], leaves: dict[str, tuple[str, tuple[int, ...]]]
) -> dict[str, tuple[int, ...]]:
    """Their tensor -> shape, for every row of a table."""
    if {row.ours for row in rows} != set(leaves):
        missing = sorted(set(leaves).symmetric_difference(row.ours for row in rows))
        raise AssertionError(f"the name map and the model disagree about {missing}")
    found = {}
    for row in rows:
        shape = row.full_shape(one_layer(leaves[row.ours][1], row))
        for i in range(config.num_layers if row.stacked else 1):
            found[row.theirs.format(i=i)] = shape
    return found


def check_copies(
    shared: dict[str, str], stored: dict[str, str], tensor: Callable[[str], np.ndarray], label: str
) -> None:
    """Raises DataError where a tensor that should repeat another does not."""
    for copy, original in shared.items():
        if copy in stored and original in stored and not np.array_equal(tensor(copy), tensor(original)):
            raise DataError(
                f"'{label}': {copy} differs from {original}, which config.json says are one (tie_word_embeddings); "
                "set tie_word_embeddings to false if the head is its own"
            )


def reader(
    rows: Sequence[Name], leaves: dict[str, tuple[str, tuple[int, ...]]], tensor: Callable[[str], np.ndarray]
) -> Callable[[Sequence[str]], dict[str, np.ndarray]]:
    """paths -> our arrays, fp32, joined from their tensors."""
    by_path = {row.ours: row for row in rows}

    def one(row: Name, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return row.to_ours(tensor(name)[row.region(shape)], shape)

    def read(paths: Sequence[str]) -> dict[str, np.ndarray]:
        found: dict[str, Any] = {}
        for path in paths:
            row, shape = by_path[path], leaves[path][1]
            array = np.empty(shape, np.float32)
            for i in range(shape[0]) if row.stacked else ():
                array[i] = one(row, row.theirs.format(i=i), shape[1:])
            if not row.stacked:
                array[...] = one(row, row.theirs, shape)
            found[path] = array
        return found

    return read
