"""A model to compute with, from whatever a user names: a run's workdir, a Hugging Face directory, plain arrays."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp

from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.shapes import Params
from bertgpt_jax.training import resume, storage
from bertgpt_jax.transfer.hf_directory import open_directory
from bertgpt_jax.transfer.npz import ARRAYS, open_npz
from bertgpt_jax.transfer.source import ModelConfig, Source, nested
from bertgpt_jax.transfer.tensors import read_json
from bertgpt_jax.transfer.workdir import open_workdir

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with its parameters.

    Attributes:
        model_config: with its vocabulary size; `models.make_model` builds the module.
        params: nested dict of arrays on the host, layers stacked under `layers`.
        tokenizer: None where the source has none.
        source: what was loaded, for messages.
        step: of the checkpoint; None for a directory of another program.
    """

    model_config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    source: str
    step: int | None


def load_model(path: str, which: str | int = "best", dtype: str | None = None) -> Loaded:
    """Loads the parameters of a workdir, of a Hugging Face directory, or of an export as npz.

    Args:
        which: checkpoint of a workdir: `best` (the newest where none was evaluated), `latest` or a step.
        dtype: cast the parameters to it; None: as they were saved.

    Raises:
        ConfigError: there is nothing of the kind at `path`; for a name of the hub, with the command that downloads it.
        DataError: it is damaged, or its parts do not belong together.
    """
    source = open_source(path, which)
    flat = source.read(list(source.leaves))
    if dtype is not None:
        flat = {name: array.astype(jnp.dtype(dtype)) for name, array in flat.items()}
    return Loaded(source.model_config, nested(flat), source.tokenizer, source.label, source.step)


def open_source(path: str, which: str | int = "best") -> Source:
    """What `load_model` reads, not yet read."""
    if is_workdir(path):
        return open_workdir(storage.workdir_path(path), which)
    directory = Path(path).expanduser()
    return open_npz(directory) if (directory / ARRAYS).is_file() else open_directory(directory)


def is_workdir(path: str) -> bool:
    """Whether `path` is the workdir of a run, and not a Hugging Face directory or an export as npz.

    Raises:
        ConfigError: it is neither; for a name of the hub, with the command that downloads it.
        DataError: its config.json is damaged.
    """
    workdir = storage.workdir_path(path) if Path(path).expanduser().is_dir() or "://" in path else None
    if workdir is None or not storage.is_directory(workdir):
        raise missing(path)
    tree = storage.read_json(workdir / resume.CONFIG_FILE)
    if isinstance(tree, dict) and "stages" in tree:
        return True
    local = storage.is_local(workdir)
    plain = local and storage.exists(workdir / ARRAYS)
    if tree is None and local and storage.exists(workdir / resume.CONFIG_FILE):
        read_json(Path(workdir / resume.CONFIG_FILE))  # says what is wrong with it
    if not plain and not (local and isinstance(tree, dict) and "model_type" in tree):
        raise ConfigError(
            f"'{path}' is neither the workdir of a run nor a Hugging Face directory: its {resume.CONFIG_FILE} is "
            + ("missing" if tree is None else "of neither")
        )
    return False


def missing(path: str) -> ConfigError:
    """The error for a path where nothing is; names of the hub get the command that fetches them."""
    if _HUB_NAME.match(path) and not path.startswith((".", "runs/")):
        local = path.rpartition("/")[2]
        return ConfigError(
            f"'{path}' is no directory here; if it is a model of the Hugging Face hub, run "
            f"`hf download {path} --local-dir {local}` and pass {local}"
        )
    return ConfigError(f"'{path}' does not exist; give the workdir of a run or a Hugging Face directory")
