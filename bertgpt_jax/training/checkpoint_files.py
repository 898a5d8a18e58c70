"""Checkpoints as directories: which steps there are, their meta data, which are whole, which may go. No arrays here.

checkpoints/<step>/meta.json                   what `Meta` says, written first
checkpoints/<step>/state/                      Orbax, a flat dict path -> array
checkpoints/<step>/state/commit_success.txt    written last: without it the save was interrupted
checkpoints/bad.<step>.<time>/                 a damaged one, set aside and never deleted by us
checkpoints/old.<step>.<time>/                 one of a timeline that was abandoned for an earlier step
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable
from typing import Any

from etils import epath

from bertgpt_jax.errors import ConfigError, DataError
from bertgpt_jax.training import storage

FORMAT_VERSION = 1
COMMIT_MARKER = "commit_success.txt"

log = logging.getLogger(__name__)


class Damaged(Exception):
    """Why a checkpoint cannot be used."""


@dataclasses.dataclass(frozen=True)
class Score:
    """What retention needs to know of a checkpoint: its stage and its metric (None: not evaluated or not finite)."""

    stage: str
    metric: float | None


def directory(workdir: epath.Path) -> epath.Path:
    """Where the checkpoints of a workdir are."""
    return workdir / "checkpoints"


def step_directory(workdir: epath.Path, step: int) -> epath.Path:
    """Where the checkpoint of a step is or would be."""
    return directory(workdir) / str(step)


# ---------------------------------------------------------------- what there is


def all_steps(workdir: epath.Path) -> list[int]:
    """Steps that have a directory, ascending, committed or not."""
    names = storage.list_names(directory(workdir))
    found = [name for name in names if name.isascii() and name.isdigit() and str(int(name)) == name]
    return sorted(int(name) for name in found if storage.is_directory(directory(workdir) / name))


def is_committed(workdir: epath.Path, step: int) -> bool:
    """Whether the save of `step` ran to its end."""
    return storage.exists(step_directory(workdir, step) / "state" / COMMIT_MARKER)


def list_steps(workdir: epath.Path) -> list[int]:
    """Steps whose save ran to its end, ascending; reading them may still show damage."""
    return [step for step in all_steps(workdir) if is_committed(workdir, step)]


# ---------------------------------------------------------------- meta data


def _digest(meta: dict[str, Any]) -> str:
    text = json.dumps({k: v for k, v in meta.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_meta(workdir: epath.Path, step: int, meta: dict[str, Any]) -> None:
    """Writes a checkpoint's meta data with a digest over itself."""
    meta = {"format_version": FORMAT_VERSION, "step": step, **meta}
    storage.write_json(step_directory(workdir, step) / "meta.json", {**meta, "sha256": _digest(meta)})


def check_meta(workdir: epath.Path, step: int) -> dict[str, Any]:
    """The meta data of a committed checkpoint, checked.

    Raises:
        Damaged: if the commit marker or the meta data is missing, torn, altered, or another step's.
        DataError: if a newer version of this package wrote it.
    """
    if not is_committed(workdir, step):
        raise Damaged("its save was interrupted (no commit marker)")
    path = step_directory(workdir, step) / "meta.json"
    text = storage.read_text(path)
    if text is None:
        raise Damaged("meta.json is missing")
    try:
        meta = json.loads(text)
        version, digest = meta["format_version"], meta["sha256"]
    except (ValueError, KeyError, TypeError):
        raise Damaged("meta.json is torn or not ours") from None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise DataError(f"'{path}' has format_version {version}; this version reads up to {FORMAT_VERSION}: update it")
    if digest != _digest(meta):
        raise Damaged("meta.json was altered (its digest does not match)")
    if meta["step"] != step:
        raise Damaged(f"it was saved as step {meta['step']} (was the directory copied?)")
    return meta


def read_meta(workdir: epath.Path, step: int | None = None) -> dict[str, Any]:
    """The meta data of the checkpoint of `step` (None: the newest whose meta data is whole), without its arrays.

    Raises:
        ConfigError: no such checkpoint; the message lists those there are.
        DataError: its meta data is damaged.
    """
    if step is not None:
        require_step(workdir, step)
    reasons = []
    for candidate in reversed(list_steps(workdir)) if step is None else [step]:
        try:
            return check_meta(workdir, candidate)
        except Damaged as error:
            reasons.append(f"step {candidate}: {error}")
    if not reasons:
        raise ConfigError(f"'{workdir}' holds no checkpoint; name a workdir in which a run has saved one")
    raise DataError(f"the meta data of no checkpoint in '{workdir}' can be used: {'; '.join(reasons)}")


def require_step(workdir: epath.Path, step: int) -> None:
    """Raises `ConfigError`, listing what there is, unless `step` is a committed checkpoint."""
    steps = list_steps(workdir)
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"'{workdir}' has no checkpoint of step {step}; available: {there}")


# ---------------------------------------------------------------- what may go


def read_score(meta: dict[str, Any], best_metric: str) -> Score:
    """The `Score` of a checkpoint, from its meta data."""
    value = (meta.get("metrics") or {}).get(best_metric)
    finite = isinstance(value, int | float) and math.isfinite(value)
    return Score(str(meta.get("stage", "")), float(value) if finite else None)


def best_steps(scores: dict[int, Score], mode: str = "min") -> dict[str, int]:
    """Stage to its step with the best finite metric; the earlier one of equals; stages without a metric are absent."""
    sign = 1.0 if mode == "min" else -1.0
    best: dict[str, int] = {}
    for step in sorted(scores):
        stage, metric = scores[step].stage, scores[step].metric
        if metric is None:
            continue
        previous = scores[best[stage]].metric if stage in best else None
        if previous is None or sign * metric < sign * previous:
            best[stage] = step
    return best


def steps_to_delete(scores: dict[int, Score], keep: int, mode: str = "min") -> list[int]:
    """Steps that are neither among the newest `keep` nor the best of their stage, ascending."""
    kept = {*sorted(scores)[-keep:], *best_steps(scores, mode).values()}
    return sorted(set(scores) - kept)


def remove(workdir: epath.Path, step: int) -> None:
    """Deletes a checkpoint; its commit marker goes first, so that a half deleted one is never taken for whole."""
    path = step_directory(workdir, step)
    storage.delete(path / "state" / COMMIT_MARKER)
    storage.delete_tree(path)


def set_aside(workdir: epath.Path, step: int, prefix: str, reason: str) -> epath.Path:
    """Moves a checkpoint out of the way, to `<prefix>.<step>.<time>` with the reason in it; returns where it is."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    names = storage.list_names(directory(workdir))
    target = f"{prefix}.{step}.{stamp}"
    while target in names:
        target += "x"
    storage.move_tree(step_directory(workdir, step), directory(workdir) / target)
    storage.write_text(directory(workdir) / target / "REASON.txt", reason + "\n")
    return directory(workdir) / target


def set_aside_all(workdir: epath.Path, steps: Iterable[tuple[int, str]], prefix: str) -> None:
    """`set_aside` of several (step, reason), each logged as a warning."""
    for step, reason in steps:
        target = set_aside(workdir, step, prefix, reason)
        log.warning("checkpoint of step %d is set aside as '%s': %s", step, target, reason)
