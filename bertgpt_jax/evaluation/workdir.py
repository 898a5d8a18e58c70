"""Evaluating what a run saved, from its workdir alone."""

from __future__ import annotations

from typing import Any

import jax

from bertgpt_jax.batches.mixture import parts_of
from bertgpt_jax.config import build
from bertgpt_jax.corpus.mixture import CorpusMixture, open_prepared
from bertgpt_jax.errors import ConfigError, DataError
from bertgpt_jax.evaluation.held_out import unigram_masked_loss
from bertgpt_jax.parallel.mesh import make_mesh
from bertgpt_jax.training import resume, setup, storage
from bertgpt_jax.training.checkpoint import read_meta, restore
from bertgpt_jax.training.data import make_held_out
from bertgpt_jax.training.loop import evaluate_stage
from bertgpt_jax.training.run_config import RunConfig, execution_here, with_changes
from bertgpt_jax.training.status import read_status


def evaluate_workdir(
    workdir_text: str,
    which: str = "latest",
    stage_name: str | None = None,
    batches: int | None = None,
    corpus_path: str | None = None,
) -> dict[str, Any]:
    """Held-out metrics of a checkpoint, on this machine's devices, whatever mesh it was saved on.

    Args:
        which: `latest`, `best` or a step.
        stage_name: whose sequence length and batch to use; None: the checkpoint's.
        batches: at most this many, of each corpus of a mixture; None: all.
        corpus_path: where the prepared corpus is now (a mixture's: `name=path,...`); None: where training found it.

    Returns:
        `step`, `stage`, `rows`, `metrics`, `evaluation_fingerprint`.

    Raises:
        ConfigError: no run or no such checkpoint there. DataError: another corpus than the run's.
    """
    workdir = storage.workdir_path(workdir_text)
    tree = storage.read_json(workdir / resume.CONFIG_FILE)
    if tree is None:
        raise ConfigError(f"'{workdir}' is not the workdir of a run: it has no {resume.CONFIG_FILE}")
    config = build(RunConfig, tree, str(workdir / resume.CONFIG_FILE))
    execution = execution_here(config)
    meta = read_meta(workdir, _step(which, read_status(workdir) or {}))
    stage = _find_stage(config, stage_name or meta["stage"])
    devices = jax.device_count()  # rows are frozen whatever the batch, so it may be rounded to what the mesh divides
    fitting = stage.model_dump(mode="json") | {
        "batch_size": -(-stage.batch_size // devices) * devices,
        "microbatches": 1,
        "batch_ramp": (),
        "length_ramp": (),
    }
    config = with_changes(config, {"execution": execution, "stages": [fitting]})
    stage = config.stages[0]

    recorded = storage.read_json(workdir / "corpus.json") or {}
    corpus = open_prepared(moved(recorded.get("path", ""), corpus_path))
    if corpus.fingerprint != meta["data_fingerprint"]:
        raise DataError(
            f"the corpus in {corpus_path or recorded.get('path', '')!r} has fingerprint {corpus.fingerprint[:12]}, "
            f"the run's has {meta['data_fingerprint'][:12]}; pass the run's with --corpus"
        )
    program = setup.make_program(config, make_mesh(config.execution.mesh))
    state, _ = restore(workdir, {"params": program.abstract_state["params"]}, meta["step"], partial=True)
    first = corpus.first if isinstance(corpus, CorpusMixture) else corpus
    held_out = make_held_out(config, 0, corpus, first.rows_directory)
    step = setup.lower_eval_step(program, stage).compile()
    metrics = evaluate_stage(program, held_out, step, state["params"], batches)
    parts = parts_of(held_out)
    if config.objective.masking is not None:
        for name, part in parts.items():
            metrics[f"{name}/unigram_mlm_loss" if name else "unigram_mlm_loss"] = unigram_masked_loss(part)
    limit = None if batches is None else batches * stage.batch_size
    rows = sum(part.eval_rows() if limit is None else min(part.eval_rows(), limit) for part in parts.values())
    return {
        "step": meta["step"],
        "stage": stage.name,
        "rows": rows,
        "metrics": metrics,
        "evaluation_fingerprint": held_out.eval_fingerprint(),
        "devices": devices,
    }


def _step(which: str, status: dict[str, Any]) -> int | None:
    if which == "latest":
        return None
    if which == "best":
        if status.get("best") is None:
            raise ConfigError("no best checkpoint is known: the run has not evaluated yet; use --which latest")
        return status["best"]
    if not which.isdigit():
        raise ConfigError(f"--which '{which}' is neither latest, best nor a step")
    return int(which)


def moved(recorded: str | dict[str, str], given: str | None) -> str | dict[str, str]:
    """Where the corpus is: as recorded unless it is given, for a mixture as `name=path,name=path`."""
    if given is None or isinstance(recorded, str):
        return given or recorded
    moved = dict(item.partition("=")[::2] for item in given.split(","))
    unknown = [name for name in moved if name not in recorded]
    if unknown:
        raise ConfigError(f"--corpus: '{unknown[0]}' is none of the mixture's corpora: {', '.join(recorded)}")
    return recorded | moved


def _find_stage(config: RunConfig, name: str):
    for stage in config.stages:
        if stage.name == name:
            return stage
    raise ConfigError(f"no stage '{name}'; the run has {[stage.name for stage in config.stages]}")
