"""Imports: parameters of another program as an ordinary checkpoint in a workdir of its own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from etils import epath

from bertgpt_jax.config import to_json
from bertgpt_jax.corpus.kinds import open_tokenizer
from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.errors import ConfigError, DataError, StorageError
from bertgpt_jax.training import resume, status, storage
from bertgpt_jax.training.checkpoint import Checkpoints
from bertgpt_jax.training.run_config import RunConfig
from bertgpt_jax.transfer.hf_directory import open_directory
from bertgpt_jax.transfer.load import missing
from bertgpt_jax.transfer.mingpt import open_mingpt
from bertgpt_jax.transfer.run_of import run_config, tokenizer_config
from bertgpt_jax.transfer.source import Source, check_vocabulary, nested


def open_foreign(path: str, *, with_tokenizer: bool = True) -> Source:
    """A Hugging Face directory, or a `.json`/`.json.gz` file in minGPT's layout.

    Raises:
        ConfigError: neither is at `path`. DataError: damaged.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return open_directory(place, with_tokenizer=with_tokenizer)
    if place.is_file() and place.name.endswith((".json", ".json.gz")):
        return open_mingpt(place)
    if place.is_file():
        raise ConfigError(f"'{path}' is a file; give a Hugging Face directory or a .json in minGPT's layout")
    raise missing(path)


def with_other_tokenizer(source: Source, path: str, kind: str) -> Source:
    """The source with a tokenizer of the user's instead of its own, because the user asked for it.

    Raises:
        ConfigError, DataError: it cannot be read, or has more ids than the model has rows.
    """
    given = source.tokenizer.kind if source.tokenizer is not None and not kind else kind or "wordpiece"
    tokenizer = open_tokenizer(tokenizer_config(given, path, None))
    check_vocabulary(source.model_config, tokenizer, source.label)
    return Source(
        source.model_config, tokenizer, source.leaves, source.read, source.label, source.step, source.meta
    )  # fmt: skip


def import_model(source: Source, out: str) -> RunConfig:
    """Writes a workdir whose checkpoint of step 0 holds the parameters; returns the config it carries.

    The checkpoint has no optimizer state: `init_from=OUT` trains on from it in a workdir of its own; evaluate,
    generate, fill_mask and export take it as it is.

    Raises:
        ConfigError: `out` exists. StorageError: it cannot be written; nothing is left there.
    """
    target = storage.workdir_path(out)
    if storage.exists(target):
        raise ConfigError(f"--out '{out}' exists; name a workdir that does not")
    config = run_config(source)
    params = nested({path: jnp.asarray(array) for path, array in source.read(list(source.leaves)).items()})
    if not storage.is_local(target):
        _write(target, config, params, source)
        return config
    parent = Path(target).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=parent) as work:
            inside = epath.Path(work) / "workdir"
            _write(inside, config, params, source)
            os.rename(inside, target)
    except OSError as error:
        raise StorageError(f"cannot write '{target}': {error.strerror or error}; nothing is left there") from error
    return config


def _write(workdir: epath.Path, config: RunConfig, params: Any, source: Source) -> None:
    sha256 = None if source.tokenizer is None else source.tokenizer.sha256
    storage.write_text(workdir / resume.CONFIG_FILE, to_json(config))
    _write_tokenizer(workdir, source.tokenizer)
    meta = {
        "config": config.model_dump(mode="json"),
        "imported_from": source.label,
        "tokenizer_sha256": sha256,
        "data_fingerprint": None,
        "stage": config.stages[0].name,
        "metrics": {},
        "mesh": {},
    }
    checkpoints = Checkpoints(workdir, max_failed_saves=1)
    zero = jnp.zeros((), jnp.int32)
    try:
        checkpoints.save({"params": params, "step": zero, "data_step": zero}, 0, meta)
    finally:
        checkpoints.close()
    if checkpoints.latest() != 0:
        raise DataError(f"the checkpoint in '{workdir}' was not committed")
    status.write_status(workdir, step=0, reason="finished", latest=0, message=f"imported from {source.label}")


def _write_tokenizer(workdir: epath.Path, tokenizer: Tokenizer | None) -> None:
    if tokenizer is not None:
        for name, content in tokenizer.files.items():
            storage.write_bytes(workdir / "tokenizer" / name, content)
