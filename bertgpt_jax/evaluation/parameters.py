"""Evaluating parameters wherever they come from: a Hugging Face directory, an import, the start of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from bertgpt_jax.corpus.builder import open_corpus
from bertgpt_jax.corpus.config import CorpusConfig, HashSplit
from bertgpt_jax.corpus.reader import MANIFEST, CorpusReader
from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.errors import ConfigError, DataError
from bertgpt_jax.parallel.mesh import make_mesh
from bertgpt_jax.parallel.sharding import flatten
from bertgpt_jax.shapes import Params
from bertgpt_jax.training import setup, storage
from bertgpt_jax.training.data import make_held_out
from bertgpt_jax.training.loop import evaluate_stage
from bertgpt_jax.training.run_config import RunConfig, execution_here, with_changes
from bertgpt_jax.transfer.initial import save_tokenizer, user_cache
from bertgpt_jax.transfer.load import is_workdir, open_source
from bertgpt_jax.transfer.run_of import run_config, tokenizer_config
from bertgpt_jax.transfer.source import Source, nested


def evaluate_source(
    path: str, which: str, stage_name: str | None, batches: int | None, corpus_path: str | None
) -> dict[str, Any]:
    """Held-out metrics of a Hugging Face directory, an npz, or a workdir that was imported.

    The objective, sequence length and batch are those of the run that trained it where that is known (an export of
    ours says so), else its family's, over at most 512 tokens.

    Args:
        corpus_path: a prepared corpus, or text that is prepared with the model's tokenizer.

    Returns:
        as `evaluate_workdir`.

    Raises:
        ConfigError: no corpus was given. DataError: it was prepared with another tokenizer.
    """
    source = open_source(path, which)
    config = run_config(source)
    if corpus_path is None:
        raise ConfigError(f"'{path}' brings no text; pass a corpus (prepared, or text) with --corpus")
    corpus = corpus_for(source.tokenizer, corpus_path, user_cache(), source.label)
    stages = [stage for stage in config.stages if stage_name in (None, stage.name)]
    if not stages:
        raise ConfigError(f"no stage '{stage_name}'; there is {[stage.name for stage in config.stages]}")
    metrics, held_out = evaluate_params(config, stages[-1].name, source_params(source), corpus, batches)
    limit = held_out.eval_rows() if batches is None else min(held_out.eval_rows(), batches * stages[-1].batch_size)
    return {
        "step": source.step or 0,
        "stage": stages[-1].name,
        "rows": limit,
        "metrics": metrics,
        "evaluation_fingerprint": held_out.eval_fingerprint(),
        "devices": jax.device_count(),
    }


def is_run(path: str) -> bool:
    """Whether `path` is the workdir of a run that was trained here, which knows its text.

    Raises:
        ConfigError: it is no model at all.
    """
    return is_workdir(path) and storage.exists(storage.workdir_path(path) / "corpus.json")


def source_params(source: Source) -> Params:
    """All parameters of a source, on the host."""
    return nested(source.read(list(source.leaves)))


def corpus_for(tokenizer: Tokenizer | None, path: str, cache_root: Path, label: str) -> CorpusReader:
    """The corpus at `path`, or one prepared from the text there with this tokenizer.

    Text that is brought for an evaluation is held out as a whole; of Python's documentation (`stdlib`) 2%.

    Raises:
        ConfigError: there is no tokenizer. DataError: it was prepared with another one.
    """
    if tokenizer is None:
        raise ConfigError(f"{label} has no tokenizer; import it with --tokenizer DIR")
    try:
        prepared = (Path(path).expanduser() / MANIFEST).is_file()  # and brings its tokenizer, which is compared below
        saved = "" if prepared else str(save_tokenizer(tokenizer, cache_root))
        setting = tokenizer_config(tokenizer.kind, saved, tokenizer)
        held_out = HashSplit(fraction=0.02 if path == "stdlib" else 0.999)
        corpus = open_corpus(CorpusConfig(path=path, tokenizer=setting, held_out=held_out), cache_root)
    except OSError as error:
        raise DataError(f"the corpus '{path}' cannot be prepared: {error}") from None
    if corpus.tokenizer.sha256 != tokenizer.sha256:
        raise DataError(
            f"the corpus '{path}' was prepared with another tokenizer ({corpus.tokenizer.sha256[:12]}) than {label} "
            f"has ({tokenizer.sha256[:12]}); give its text, or a corpus prepared with the model's"
        )
    return corpus


def evaluate_params(
    config: RunConfig, stage_name: str, params: Params, corpus: CorpusReader, batches: int | None
) -> tuple[dict[str, float], Any]:
    """(metrics, data set) of parameters on a corpus's held-out split, in the shape of one of the run's stages."""
    stage = next(stage for stage in config.stages if stage.name == stage_name)
    devices = jax.device_count()
    fitting = stage.model_dump(mode="json") | {
        "batch_size": -(-stage.batch_size // devices) * devices,
        "microbatches": 1,
        "batch_ramp": (),
        "length_ramp": (),
    }
    execution = execution_here(config)
    single = {"kind": "single", "path": str(corpus.path), "tokenizer": _setting(config)}
    config = with_changes(config, {"execution": execution, "stages": [fitting], "corpus": single})
    program = setup.make_program(config, make_mesh(config.execution.mesh))
    abstract, flat = flatten(program.abstract_state["params"]), flatten(params)

    def place(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array = np.asarray(flat[name], leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    placed = nested({name: place(name, leaf) for name, leaf in abstract.items()})
    held_out = make_held_out(config, 0, corpus, corpus.rows_directory)
    step = setup.lower_eval_step(program, config.stages[0]).compile()
    return evaluate_stage(program, held_out, step, placed, batches), held_out


def _setting(config: RunConfig) -> dict[str, Any]:
    """The tokenizer's setting without its path: the corpus brings the tokenizer itself."""
    return config.corpus.tokenizer.model_dump(mode="json") | {"path": ""}
