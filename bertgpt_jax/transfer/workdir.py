"""Parameters of a checkpoint in a workdir, verified against their fingerprints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from bertgpt_jax.config import build
from bertgpt_jax.corpus.kinds import load_tokenizer
from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.errors import ConfigError, DataError, StorageError, UsageError
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.training import checkpoint_files, storage
from bertgpt_jax.training.restore import restore
from bertgpt_jax.transfer.source import ModelConfig, Source, check_vocabulary, without_padding

PREFIX = "params/"
"""Paths of parameters in a checkpoint begin with it."""

BEST_METRIC = "eval/loss"


def open_workdir(workdir: epath.Path, which: str | int = "best") -> Source:
    """The parameters of a run's checkpoint, without the rows that only pad the vocabulary.

    Args:
        which: `best` (lowest held-out loss of the newest checkpoint's stage; the newest where none was evaluated),
            `latest`, or a step.

    Raises:
        ConfigError: no such checkpoint; the message lists those there are. DataError: damaged, or another tokenizer's.
    """
    meta = checkpoint_files.read_meta(workdir, choose_step(workdir, which))
    config = model_config(meta["config"]["model"], f"'{workdir}', step {meta['step']}")
    label = f"{workdir}, step {meta['step']:,}"
    tokenizer = read_tokenizer(workdir, meta.get("tokenizer_sha256"))
    check_vocabulary(config, tokenizer, label)
    saved = {path.removeprefix(PREFIX): leaf for path, leaf in meta["leaves"].items() if path.startswith(PREFIX)}
    leaves = {path: (dtype, tuple(shape)) for path, (dtype, shape) in saved.items()}

    def read(paths: Sequence[str]) -> dict[str, np.ndarray]:
        try:
            arrays = read_arrays(workdir, meta, [PREFIX + path for path in paths])
        except (DataError, ConfigError, StorageError) as error:
            if checkpoint_files.is_committed(workdir, meta["step"]):
                raise
            raise ConfigError(
                f"{label}: the run that trains here removed this checkpoint while it was read; start again, or raise "
                "execution.keep"
            ) from error
        return {path.removeprefix(PREFIX): array for path, array in arrays.items()}

    return without_padding(Source(config, tokenizer, leaves, read, label, meta["step"], meta))


def choose_step(workdir: epath.Path, which: str | int) -> int:
    """The step that `which` means.

    Raises:
        ConfigError: there is no checkpoint. UsageError: `which` is neither best, latest nor a number.
    """
    if which == "latest":
        return checkpoint_files.read_meta(workdir)["step"]
    if which != "best":
        if not str(which).isdigit():
            raise UsageError(f"--which '{which}' is neither best, latest nor a step")
        return int(which)
    newest = checkpoint_files.read_meta(workdir)
    scores = {newest["step"]: checkpoint_files.read_score(newest, BEST_METRIC)}
    for step in checkpoint_files.list_steps(workdir):
        try:
            scores[step] = checkpoint_files.read_score(checkpoint_files.check_meta(workdir, step), BEST_METRIC)
        except checkpoint_files.Damaged:
            continue
    return checkpoint_files.best_steps(scores).get(str(newest.get("stage", "")), newest["step"])


def model_config(tree: dict[str, Any], source: str) -> ModelConfig:
    """The model config of a JSON tree.

    Raises:
        DataError: of a family this version does not know, or without a vocabulary size.
    """
    families = {"bert": BertConfig, "gpt": GptConfig}
    kind = tree.get("kind")
    if kind not in families:
        raise DataError(f"{source}: model.kind '{kind}' cannot be read here; known: {', '.join(families)}")
    config = build(families[kind], tree, source)
    if config.vocab_size is None:
        raise DataError(f"{source}: its model has no vocabulary size; the checkpoint is not of this program")
    return config


def read_arrays(workdir: epath.Path, meta: dict[str, Any], paths: Sequence[str]) -> dict[str, np.ndarray]:
    """Some arrays of a checkpoint on the host, by path, their fingerprints verified.

    Raises:
        DataError: damaged.
    """
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    abstract = {}
    for path in paths:
        dtype, shape = meta["leaves"][path]
        abstract[path] = jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=host)
    arrays, _ = restore(workdir, abstract, meta["step"], partial=True)
    return {path: np.asarray(array) for path, array in arrays.items()}


def read_tokenizer(workdir: epath.Path, sha256: str | None) -> Tokenizer | None:
    """The tokenizer a workdir keeps; None if it has none and the checkpoint was saved without.

    Raises:
        DataError: it is not the one the checkpoint was trained with.
    """
    if sha256 is None:
        return None
    directory = workdir / "tokenizer"
    if not storage.is_directory(directory):
        raise ConfigError(f"'{workdir}' has no tokenizer directory; copy the run's whole workdir, not its checkpoints")
    tokenizer = load_tokenizer(str(directory))
    if tokenizer.sha256 != sha256:
        raise DataError(
            f"'{directory}' holds another tokenizer ({tokenizer.sha256[:12]}) than the checkpoint was trained with "
            f"({sha256[:12]}); bring back the run's own"
        )
    return tokenizer
