"""Reading checkpoints back: newest first, never one that is damaged, never silently from scratch.

Orbax restores a flipped bit as another weight, casts another dtype without a word and has no fallback; so structure,
shapes and dtypes are compared before the arrays are read, and their fingerprint after.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
import orbax.checkpoint as ocp
from etils import epath

from bertgpt_jax.errors import ConfigError, DataError, StorageError
from bertgpt_jax.parallel.sharding import flatten
from bertgpt_jax.training import checkpoint_files as files
from bertgpt_jax.training import processes, storage
from bertgpt_jax.training.fingerprint import describe_leaves, fingerprint_tree

log = logging.getLogger(__name__)


def restore(
    workdir: epath.Path, abstract: Any, step: int | None = None, *, partial: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Restores one checkpoint (None: the newest whose meta data is whole) and changes nothing on disk.

    `abstract` is a tree of `ShapeDtypeStruct`s with the shardings wanted; with `partial` it may be a part of the saved
    state (`{"params": ...}`). Returns (state, meta data). With several processes, all of them must call this.

    Raises:
        ConfigError: no such checkpoint (the message lists those there are), or its leaves differ from `abstract`.
        DataError: it is damaged.
    """
    meta = processes.on_primary(files.read_meta, workdir, step)
    _compare(workdir, meta, abstract, partial)
    try:
        return _read(workdir, meta, abstract, partial), meta
    except files.Damaged as error:
        raise DataError(f"the checkpoint of step {meta['step']} in '{workdir}' is damaged: {error}") from error


def restore_latest_valid(workdir: epath.Path, abstract_at: Callable[[int], Any]) -> tuple[Any, dict[str, Any]] | None:
    """Restores the newest undamaged checkpoint; None if no save of this workdir was ever committed.

    `abstract_at(step)` is what the state of a step is to be like: stages may have different moments.

    Damaged newer ones are set aside (`bad.<step>.<time>`) and what interrupted saves left is removed, both only after
    an undamaged checkpoint was found. With several processes, all of them must call this.

    Raises:
        DataError: all are damaged (nothing on disk was changed), or one was written by a newer version.
        ConfigError: the newest undamaged one's leaves differ from what they are to be; the message lists them.
    """
    listed = processes.on_primary(_survey, workdir)
    damaged: list[tuple[int, str]] = listed["damaged"]
    for meta in listed["metas"]:
        abstract = abstract_at(meta["step"])
        _compare(workdir, meta, abstract, partial=False)
        try:
            state = _read(workdir, meta, abstract, partial=False)
        except files.Damaged as error:
            damaged.append((meta["step"], str(error)))
            log.warning("the checkpoint of step %d is damaged: %s; trying an older one", meta["step"], error)
            continue
        newer = [(step, reason) for step, reason in damaged if step > meta["step"]]
        processes.on_primary(_clean_up, workdir, newer, listed["interrupted"])
        return state, meta
    if damaged:
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in sorted(damaged, reverse=True))
        raise DataError(
            f"every checkpoint in '{workdir}' is damaged ({reasons}); nothing was changed: bring one back from a"
            " backup, or name another workdir to start anew"
        )
    for step in listed["interrupted"]:
        log.warning("the checkpoint of step %d was not committed (its save was interrupted): not used", step)
    return None


def quiet_orbax() -> None:
    """Orbax tells its life at INFO and WARNING; what matters comes as an exception."""
    absl.logging.set_verbosity(absl.logging.ERROR)


def _survey(workdir: epath.Path) -> dict[str, Any]:
    """Sorts the step directories into whole meta data (newest first), damaged (step, reason) and interrupted saves."""
    metas, damaged, interrupted = [], [], []
    for step in reversed(files.all_steps(workdir)):
        if not files.is_committed(workdir, step):
            interrupted.append(step)
            continue
        try:
            metas.append(files.check_meta(workdir, step))
        except files.Damaged as error:
            damaged.append((step, str(error)))
            log.warning("the checkpoint of step %d is damaged: %s", step, error)
    return {"metas": metas, "damaged": damaged, "interrupted": interrupted}


def _clean_up(workdir: epath.Path, damaged: list[tuple[int, str]], interrupted: list[int]) -> None:
    files.set_aside_all(workdir, damaged, "bad")
    for step in interrupted:
        log.warning("the checkpoint of step %d was not committed (its save was interrupted): removed", step)
        files.remove(workdir, step)


# ---------------------------------------------------------------- structure


def _compare(workdir: epath.Path, meta: dict[str, Any], abstract: Any, partial: bool) -> None:
    """Raises `ConfigError` listing the first 10 leaves that differ, and how many there are."""
    saved = {path: (dtype, tuple(shape)) for path, (dtype, shape) in meta["leaves"].items()}
    wanted = describe_leaves(abstract)
    paths = [*wanted, *([] if partial else [p for p in saved if p not in wanted])]
    different = [p for p in paths if saved.get(p) != wanted.get(p)]
    if not different:
        return
    shown = "; ".join(f"{p}: {_show(saved.get(p))} saved, {_show(wanted.get(p))} wanted" for p in different[:10])
    more = f"; and {len(different) - 10} more" if len(different) > 10 else ""
    hint = "name another workdir or the config it was trained with"
    if all(p.startswith("optimizer/") for p in different):
        hint = (
            "only the optimizer differs: name the one it was trained with, or begin a new one from the parameters, "
            f"in another workdir: init_from={workdir}"
        )
    raise ConfigError(
        f"the checkpoint of step {meta['step']} in '{workdir}' does not fit this config, {len(different)} of"
        f" {len(paths)} leaves differ ({shown}{more}); {hint}"
    )


def _show(leaf: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if leaf is None else f"{leaf[0]}[{','.join(map(str, leaf[1]))}]"


# ---------------------------------------------------------------- arrays


def _read(workdir: epath.Path, meta: dict[str, Any], abstract: Any, partial: bool) -> Any:
    """The arrays of a checkpoint in the shardings of `abstract`, their fingerprint verified.

    Raises:
        Damaged: in every process, if any could not read its part or if the fingerprint differs.
    """
    quiet_orbax()
    flat = flatten(abstract)
    reason, arrays = "", None
    try:
        with _finishing_reads(), _arrays_directory(workdir, meta["step"]) as directory:
            arrays = ocp.PyTreeCheckpointHandler().restore(
                directory,
                args=ocp.args.PyTreeRestore(
                    item=flat,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(flat),
                    partial_restore=partial,
                ),
            )
    except (PermissionError, ConnectionError, TimeoutError) as error:
        raise StorageError(f"cannot read the checkpoint of step {meta['step']} in '{workdir}': {error}") from error
    except (jax.errors.JaxRuntimeError, MemoryError, StorageError):
        raise  # no memory, or no access: says nothing about the checkpoint
    except Exception as error:  # Orbax has no error class for damage: JSONDecodeError, KeyError, ValueError, Exception
        reason = _reason(error)
    if not processes.all_agree(not reason):
        raise files.Damaged(reason or "another process could not read its part")
    found = fingerprint_tree(arrays)
    wrong = [path for path, value in found.items() if meta["fingerprints"].get(path) != value]
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise files.Damaged(f"the fingerprint of {shown} differs from what was saved: its bits have changed")
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract), [arrays[path] for path in flat])


def _reason(error: Exception) -> str:
    """An error of Orbax or TensorStore on one short line, without the specification they append."""
    text = " ".join(str(error).split())
    for tail in (" [tensorstore_spec", " [source locations", " See full TensorStore"):
        text = text.partition(tail)[0]
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:150] + ' ... ' + text[-150:]}"


class _FinishingLoop(asyncio.SelectorEventLoop):
    """An event loop that closes only when all it was given to do has ended."""

    def close(self) -> None:
        left = set() if self.is_closed() else asyncio.all_tasks(self)
        if left:
            self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        super().close()


class _FinishingLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _FinishingLoop()


@contextlib.contextmanager
def _finishing_reads() -> Iterator[None]:
    """When one of Orbax's reads fails it closes the loop of all others; those then report to a loop that is gone.

    TensorStore's threads do that at any later moment, with a traceback each; a process on Python 3.12 crashed by it.
    """
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_FinishingLoops())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


@contextlib.contextmanager
def _arrays_directory(workdir: epath.Path, step: int) -> Iterator[epath.Path]:
    """Where Orbax can read the arrays: in place, or (a bucket it does not know) in a local copy."""
    directory = files.step_directory(workdir, step) / "state"
    if storage.is_local(directory) or str(directory).startswith("gs://"):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="bertgpt-restore-") as local:
        storage.copy_tree(directory, epath.Path(local))
        yield epath.Path(Path(local).resolve())
