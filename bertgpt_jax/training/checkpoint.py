"""Saving checkpoints without stopping the training, and keeping the newest and the best of them.

Orbax writes the arrays (`AsyncCheckpointer`, commit marker instead of a rename); which checkpoints exist, are whole,
and may go is ours (`checkpoint_files.py`, `restore.py`): Orbax's retention deletes the newest when the metric worsens.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

import bertgpt_jax
from bertgpt_jax.errors import ConfigError, StorageError, UserError
from bertgpt_jax.parallel.sharding import flatten
from bertgpt_jax.training import checkpoint_files as files
from bertgpt_jax.training import processes, storage
from bertgpt_jax.training import restore as restoring
from bertgpt_jax.training.checkpoint_files import list_steps, read_meta
from bertgpt_jax.training.fingerprint import combine, describe_leaves
from bertgpt_jax.training.page_cache import Uncached
from bertgpt_jax.training.restore import restore, restore_latest_valid
from bertgpt_jax.training.rows import to_number
from bertgpt_jax.training.snapshot import Snapshots

__all__ = ["Checkpoints", "list_steps", "read_meta", "restore", "restore_latest_valid"]

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. With several processes, all of them call every method, in the same order.

    Args:
        workdir: absolute path, as `storage.workdir_path` gives it.
        keep: how many of the newest to keep; the best of each stage is kept besides.
        best_metric: the key of `meta["metrics"]` that says which is best.
        best_mode: whether the smallest (`min`) or the largest (`max`) is.
        max_failed_saves: how many saves in a row may fail (disk full, bucket gone) before `StorageError` ends the run.
    """

    def __init__(
        self,
        workdir: epath.Path,
        keep: int = 3,
        *,
        best_metric: str = "eval/loss",
        best_mode: str = "min",
        max_failed_saves: int = 3,
    ):
        if keep < 1:
            raise ConfigError(f"checkpoints kept = {keep}: at least 1 must be kept")
        restoring.quiet_orbax()
        self.workdir = workdir
        self.keep, self.best_metric, self.best_mode = keep, best_metric, best_mode
        self._max_failed, self._failed = max_failed_saves, 0
        self._pending: tuple[int, files.Score] | None = None
        self._snapshots = Snapshots()
        self._uncached: Uncached | None = None
        self._scores = self._read_scores()
        self._background = ThreadPoolExecutor(1, "checkpoints")
        self._removals: list[Future[None]] = []
        self._upload: Future[None] | None = None
        self._staging = _staging_directory(workdir)
        self._saver = ocp.AsyncCheckpointer(
            # weights and moments hardly shrink, and trying takes most of a save's CPU time
            ocp.PyTreeCheckpointHandler(use_compression=False),
            atomicity_options=AtomicityOptions(mode=AtomicityMode.COMMIT_FILE),
        )

    # ------------------------------------------------------------ what there is

    def _read_scores(self) -> dict[int, files.Score]:
        """Stage and metric of every committed checkpoint on disk; the primary process looks."""

        def look() -> list[Any]:
            found = []
            for step in files.list_steps(self.workdir):
                with contextlib.suppress(files.Damaged):
                    score = files.read_score(files.check_meta(self.workdir, step), self.best_metric)
                    found.append([step, score.stage, score.metric])
            return found

        return {step: files.Score(stage, metric) for step, stage, metric in processes.on_primary(look)}

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending (of a save that is under way: after `wait`)."""
        return sorted(self._scores)

    def latest(self) -> int | None:
        """The newest committed step."""
        return max(self._scores, default=None)

    def best(self, stage: str | None = None) -> int | None:
        """The committed step with the best metric of a stage (None: of the newest checkpoint's stage)."""
        if not self._scores:
            return None
        stage = self._scores[max(self._scores)].stage if stage is None else stage
        return files.best_steps(self._scores, self.best_mode).get(stage)

    # ------------------------------------------------------------ save

    def save(self, state: Any, step: int, meta: dict[str, Any]) -> bool:
        """Starts saving and returns; the state may be donated to the next step at once.

        Args:
            state: a tree of `jax.Array`s.
            step: its number.
            meta: JSON tree: `config`, `identity`, `tokenizer_sha256`, `data_fingerprint`, `stage`, `metrics`, `mesh`...
                Fingerprints, leaves and versions are added here.

        Returns:
            Whether a save was started: False if this very state is saved already, or if the save failed (logged).

        Raises:
            StorageError: after `max_failed_saves` failures in a row.
        """
        self._collect()
        arrays, fingerprints = self._snapshots.take(flatten(state))
        metrics = {name: to_number(value) for name, value in (meta.get("metrics") or {}).items()}
        meta = {**_describe(arrays, fingerprints), **meta, "metrics": metrics}
        size = sum(x.nbytes for x in arrays.values())
        try:
            if not processes.on_primary(self._prepare, step, meta, size):
                return False
            target = files.step_directory(self.workdir, step) if self._staging is None else self._staging / str(step)
            self._uncached = Uncached(target / "state", target / "state" / files.COMMIT_MARKER)
            self._saver.save(target / "state", args=ocp.args.PyTreeSave(arrays))
            if self._staging is not None:
                self._upload = self._background.submit(self._finish_staged, step)
        except Exception as error:  # whatever storage does to us, the training is worth more than one save
            self._fail(step, error)
            return False
        self._pending = (step, files.read_score(meta, self.best_metric))
        return True

    def _prepare(self, step: int, meta: dict[str, Any], size: int) -> bool:
        """Makes room for a step and writes its meta data; False if it is already saved. Primary process only."""
        if step in files.all_steps(self.workdir):
            if files.is_committed(self.workdir, step):
                with contextlib.suppress(files.Damaged):
                    if files.check_meta(self.workdir, step)["state_fingerprint"] == meta["state_fingerprint"]:
                        return False
                files.set_aside_all(self.workdir, [(step, "another state was saved as this step")], "old")
            else:
                files.remove(self.workdir, step)
        free = storage.free_bytes(self.workdir)
        if free is not None and free < size:
            raise StorageError(f"'{self.workdir}' has {free:,} bytes left; the state has {size:,}: free some space")
        files.write_meta(self.workdir, step, meta)
        return True

    # ------------------------------------------------------------ after a save

    def _collect(self) -> None:
        """Waits for the save under way, counts it, and lets the checkpoints go that it makes superfluous."""
        if self._pending is None:
            return
        (step, score), self._pending = self._pending, None
        try:
            if self._upload is not None:
                self._upload.result()
            self._saver.wait_until_finished()
            self._stop_dropping()
            if not processes.on_primary(files.is_committed, self.workdir, step):
                raise StorageError(f"the checkpoint of step {step} has no commit marker")
        except Exception as error:
            self._fail(step, error)
            return
        self._failed = 0
        self._scores[step] = score
        for old in files.steps_to_delete(self._scores, self.keep, self.best_mode):
            del self._scores[old]
            if processes.is_primary():
                self._removals.append(self._background.submit(_remove_or_warn, self.workdir, old))

    def _fail(self, step: int, error: Exception) -> None:
        """Logs a failed save and removes what it left; the last straw raises."""
        self._failed += 1
        self._stop_dropping()
        self._snapshots.forget()  # a thread of the save may still read it
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if processes.is_primary():
            with contextlib.suppress(StorageError):
                if not files.is_committed(self.workdir, step):
                    files.remove(self.workdir, step)
        if self._failed >= self._max_failed:
            raise StorageError(
                f"{self._failed} saves in a row failed, the last at step {step}: {reason};"
                f" last good step: {self.latest()}"
            ) from error
        log.warning("saving step %d failed (%d in a row): %s; training goes on", step, self._failed, reason)

    def _stop_dropping(self) -> None:
        if self._uncached is not None:
            self._uncached.stop()
            self._uncached = None

    def wait(self) -> None:
        """Returns when no save and no removal is under way."""
        self._collect()
        for removal in self._removals:
            removal.result()
        self._removals.clear()

    def close(self) -> None:
        """`wait`, and stops the threads."""
        self.wait()
        self._saver.close()
        self._background.shutdown()
        if self._staging is not None:
            storage.delete_tree(self._staging)

    # ------------------------------------------------------------ restore

    def restore_latest_valid(self, abstract_at: Callable[[int], Any]) -> tuple[Any, dict[str, Any]] | None:
        """See `restore.restore_latest_valid`; what it set aside is forgotten here too."""
        found = restoring.restore_latest_valid(self.workdir, abstract_at)
        self._scores = self._read_scores()
        return found

    def rewind(self, abstract: Any, step: int) -> tuple[Any, dict[str, Any]]:
        """Restores `step` to train on from there; newer checkpoints are set aside as `old.<step>.<time>`.

        Raises:
            ConfigError: no such checkpoint (lists those there are), or its leaves differ from `abstract`.
            DataError: it is damaged.
        """
        found = restoring.restore(self.workdir, abstract, step)
        newer = [(s, f"training was taken up again from step {step}") for s in self.steps() if s > step]
        processes.on_primary(files.set_aside_all, self.workdir, newer, "old")
        self._scores = self._read_scores()
        return found

    # ------------------------------------------------------------ buckets that Orbax cannot write

    def _finish_staged(self, step: int) -> None:
        """Waits for a staged checkpoint and copies it to the workdir, its commit marker last; in the background."""
        assert self._staging is not None
        self._saver.wait_until_finished()
        source, target = self._staging / str(step), files.step_directory(self.workdir, step)
        marker = storage.read_bytes(source / "state" / files.COMMIT_MARKER)
        if marker is None:
            raise StorageError(f"the staged checkpoint of step {step} was not committed")
        storage.delete(source / "state" / files.COMMIT_MARKER)
        storage.copy_tree(source / "state", target / "state")
        storage.write_bytes(target / "state" / files.COMMIT_MARKER, marker)
        storage.delete_tree(source)


def _remove_or_warn(workdir: epath.Path, step: int) -> None:
    try:
        files.remove(workdir, step)
    except StorageError as error:
        log.warning("an old checkpoint stays: %s", error)


def _staging_directory(workdir: epath.Path) -> epath.Path | None:
    """A local directory for saving first, where Orbax cannot write into the workdir itself; else None.

    TensorStore's local files need rename, and Orbax 0.12 knows no bucket but `gs://`.
    """
    if str(workdir).startswith("gs://") or (storage.is_local(workdir) and storage.probe(workdir).renames):
        return None
    if jax.process_count() > 1:
        raise ConfigError(f"workdir '{workdir}' works with one process only; for several, use gs:// or a shared disk")
    return epath.Path(tempfile.mkdtemp(prefix="bertgpt-save-"))


def _describe(arrays: dict[str, Any], fingerprints: dict[str, int]) -> dict[str, Any]:
    """The part of a checkpoint's meta data that follows from its arrays and from where it was made."""
    leaves = describe_leaves(arrays)
    return {
        "state_fingerprint": combine(fingerprints, leaves),
        "fingerprints": fingerprints,
        "leaves": {path: [dtype, list(shape)] for path, (dtype, shape) in leaves.items()},
        "versions": {
            "bertgpt_jax": bertgpt_jax.__version__,
            "jax": jax.__version__,
            "orbax": ocp.__version__,
            "python": platform.python_version(),
        },
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }
