"""Beginning a run from other parameters (`init_from`): its sizes, its tokenizer, and what is new in it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bertgpt_jax.config import build
from bertgpt_jax.corpus.kinds import open_tokenizer
from bertgpt_jax.corpus.reader import MANIFEST, CorpusReader
from bertgpt_jax.corpus.tokenizer import CONFIG_FILE, Tokenizer
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.parallel.sharding import flatten
from bertgpt_jax.shapes import Params
from bertgpt_jax.training import checkpoint_files, resume, storage
from bertgpt_jax.training.run_config import RunConfig, with_changes
from bertgpt_jax.training.workdir import cache_root
from bertgpt_jax.transfer.family import TRAINING_ONLY
from bertgpt_jax.transfer.load import open_source
from bertgpt_jax.transfer.run_of import tokenizer_config
from bertgpt_jax.transfer.source import Source, nested

KEPT = (TRAINING_ONLY - {"kind"}) | {"hidden_dropout", "attention_dropout", "vocab_multiple"}
"""Fields of the model that stay the config's: they say how it is trained, not what it is."""

GROWING = ("token_embedding/table", "position_embedding/table", "masked_output/table", "masked_bias", "output/table")
"""Parameters that may have more rows than before."""


@dataclasses.dataclass(frozen=True)
class Initial:
    """Parameters to begin from.

    Attributes:
        label: where they come from.
        place: freshly drawn parameters -> those with the old ones in their places, new rows as they were drawn.
    """

    label: str
    place: Callable[[Params], Params]


def resolve(config: RunConfig, workdir_text: str) -> tuple[RunConfig, Initial | None]:
    """The config with the sizes and the tokenizer of `init_from`, and the parameters to begin from.

    A workdir that has a checkpoint already goes on from that one, and `init_from` may be gone by then: the sizes are
    then those the workdir was begun with, and there is nothing to begin from.

    Raises:
        ConfigError: another family, a shorter position table, or a tokenizer that is not the model's and was not asked
            for.
    """
    workdir = storage.workdir_path(workdir_text)
    begun = storage.read_json(workdir / resume.CONFIG_FILE)
    if isinstance(begun, dict) and checkpoint_files.list_steps(workdir) and begun.get("init_from") == config.init_from:
        corpus = config.corpus.model_dump(mode="json") | {"tokenizer": begun["corpus"]["tokenizer"]}
        return with_changes(config, {"model": begun["model"], "corpus": corpus}), None
    source = open_source(config.init_from)
    if source.model_config.kind != config.model.kind:
        raise ConfigError(
            f"init_from '{config.init_from}' is a {source.model_config.kind}, the config trains a {config.model.kind}; "
            f"use configs/continue/{'bert' if source.model_config.kind == 'bert' else 'gpt2'}.py"
        )
    kept = {name: value for name, value in config.model.model_dump(mode="json").items() if name in KEPT}
    model = source.model_config.model_dump(mode="json") | kept
    longer = config.extend.max_positions or model["max_positions"]
    if longer < model["max_positions"]:
        raise ConfigError(
            f"extend.max_positions {longer} is below the {model['max_positions']} of '{config.init_from}'; "
            "a position table is never cut"
        )
    corpus, rows = _with_tokenizer(config, source, cache_root(workdir))
    model |= {"max_positions": longer, "vocab_size": rows}
    config = with_changes(config, {"model": model, "corpus": corpus})
    return config, Initial(source.label, lambda fresh: overlay(source, fresh))


def _with_tokenizer(config: RunConfig, source: Source, root: Path) -> tuple[dict[str, Any], int | None]:
    """The corpus setting with the tokenizer that is used, and the rows the model needs for it."""
    corpus, own, rows = config.corpus.model_dump(mode="json"), source.tokenizer, source.model_config.vocab_size
    given = _given_tokenizer(config)
    if given is None and config.extend.new_tokenizer:
        return corpus, None  # trained on the corpus
    if given is None:
        if own is None:
            raise ConfigError(
                f"'{config.init_from}' has no tokenizer; name one (corpus.tokenizer.path) and ask for it: "
                "extend.new_tokenizer=true"
            )
        path = str(save_tokenizer(own, root))
        return corpus | {"tokenizer": tokenizer_config(own.kind, path, own).model_dump(mode="json")}, rows
    if not config.extend.new_tokenizer and not _extends(given, own):
        raise ConfigError(
            f"the tokenizer of the corpus ({given.kind}, {given.sha256[:12]}) is not the one of '{config.init_from}' "
            f"({'none' if own is None else f'{own.kind}, {own.sha256[:12]}'}): its ids mean other words to the model; "
            "leave corpus.tokenizer.path and prepared corpora out to use the model's, or ask for it: "
            "extend.new_tokenizer=true"
        )
    return corpus, max(rows, given.vocab_size)


def _given_tokenizer(config: RunConfig) -> Tokenizer | None:
    """The tokenizer that the config or a prepared corpus brings."""
    path = config.corpus.path if isinstance(getattr(config.corpus, "path", None), str) else ""
    if path and (Path(path).expanduser() / MANIFEST).is_file():
        return CorpusReader(Path(path).expanduser()).tokenizer
    setting = getattr(config.corpus, "tokenizer", None)
    return open_tokenizer(setting) if setting is not None and setting.path else None


def _extends(new: Tokenizer, old: Tokenizer | None) -> bool:
    """Whether every id of the old tokenizer is the same piece in the new one."""
    if old is None or new.kind != old.kind or new.vocab_size < old.vocab_size:
        return False
    return new.sha256 == old.sha256 or all(new.token(i) == old.token(i) for i in range(old.vocab_size))


def overlay(source: Source, fresh: Params) -> Params:
    """Fresh (sharded) parameters with the source's in their places; rows that the source lacks stay as drawn.

    Raises:
        ConfigError: listing parameters whose shapes do not allow that.
    """
    flat = flatten(fresh)
    problems = []
    for path, leaf in flat.items():
        old = source.leaves.get(path, ("", ()))[1]
        grows = path in GROWING and len(old) == leaf.ndim and old[1:] == leaf.shape[1:] and old[0] <= leaf.shape[0]
        if old != leaf.shape and not grows:
            problems.append(f"{path}: {list(old) or 'absent'} there, {list(leaf.shape)} here")
    problems += [f"{path}: there only" for path in source.leaves if path not in flat]
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ConfigError(
            f"the parameters of {source.label} do not fit, {len(problems)} differ: {'; '.join(problems[:10])}{more}"
        )
    placed = {}
    for path, leaf in flat.items():
        array = source.read([path])[path].astype(leaf.dtype)
        if array.shape != leaf.shape:
            array = np.concatenate([array, np.asarray(jax.device_get(leaf))[len(array) :]])
        placed[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index, a=array: a[index])
    return nested(placed)


def save_tokenizer(tokenizer: Tokenizer, root: Path) -> Path:
    """Where a tokenizer is kept below a cache directory, written if it is not there."""
    target = root / "tokenizers" / tokenizer.sha256[:16]
    if not (target / CONFIG_FILE).is_file():
        work = target.with_name(f".{target.name}.{os.getpid()}")
        tokenizer.save(work)
        try:
            os.rename(work, target)
        except OSError:  # another process was first
            shutil.rmtree(work, ignore_errors=True)
    return target


def user_cache() -> Path:
    """Where corpora are prepared for what has no workdir of its own."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "bertgpt_jax" / "corpora"


def begun_config(workdir_text: str) -> RunConfig:
    """The resolved config of a workdir."""
    path = storage.workdir_path(workdir_text) / resume.CONFIG_FILE
    return build(RunConfig, storage.read_json(path), str(path))
