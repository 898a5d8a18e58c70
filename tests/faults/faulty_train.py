"""`tools/train.py` with faults: `faulty_train.py FAULTS BATCH_LOG [arguments of train]`.

FAULTS is a JSON object:
    signal: [name, step]         this process gets the signal once `step` steps have been started
    evaluation: [name, step]     it gets the signal within the evaluation of `step`, after its first batch
    refuse: directory            nothing below it can be renamed, appended to or changed in place
    nan_from: step               from this step on every loss is not a number
    settled: true                every save is on disk before the next step, so that what a kill leaves is known
    bad_batch: n                 batch n of each stage raises an error

Every batch that is trained on is noted in BATCH_LOG: one line of JSON a batch and process, a digest for each row.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def _row_digests(batch: dict[str, Any]) -> dict[int, str]:
    """Digest of each row of a placed batch that lies on this process's devices."""
    rows: dict[int, Any] = {}
    for name in sorted(batch):
        whole = {}
        for shard in batch[name].addressable_shards:
            first = shard.index[0].start or 0
            whole |= {first + i: row.tobytes() for i, row in enumerate(np.asarray(shard.data))}
        for index, data in whole.items():
            rows.setdefault(index, hashlib.sha256()).update(name.encode() + data)
    return {index: rows[index].hexdigest()[:16] for index in sorted(rows)}


def log_batches(path: Path) -> None:
    """Notes the batches that the loop takes, not those that are built ahead."""
    from bertgpt_jax.training import loop

    real = loop.prefetch

    def prefetch(build: Callable, start: int, stop: int, *rest: int) -> Iterator[Any]:
        batches = real(build, start, stop, *rest)
        for n, batch in zip(range(start, stop), batches, strict=True):
            note = {"length": batch["tokens"].shape[1], "batch": n, "rows": _row_digests(batch)}
            with open(path, "a") as log:
                log.write(json.dumps(note) + "\n")
            yield batch
        batches.close()

    loop.prefetch = prefetch


def send_signal(name: str, step: int) -> None:
    """The step is under way on the device and its predecessor logged when the signal comes."""
    from bertgpt_jax.training.metrics import MetricWriter

    real = MetricWriter.tick

    def tick(self: MetricWriter, now: int) -> None:
        real(self, now)
        if now == step:
            os.kill(os.getpid(), signal.Signals[name])

    MetricWriter.tick = tick


def send_signal_in_evaluation(name: str, step: int) -> None:
    """The signal comes between the first and the second batch of an evaluation."""
    from bertgpt_jax.batches.dataset import Dataset
    from bertgpt_jax.training.loop import Loop

    evaluate, eval_batch = Loop._evaluate, Dataset.eval_batch
    armed: list[bool] = []

    def _evaluate(self: Loop, *args: Any) -> bool:
        armed[:] = [True] if self.step == step else []
        return evaluate(self, *args)

    def _eval_batch(self: Dataset, i: int, *args: Any) -> Any:
        if armed and i == 1:
            armed.clear()
            os.kill(os.getpid(), signal.Signals[name])
        return eval_batch(self, i, *args)

    Loop._evaluate, Dataset.eval_batch = _evaluate, _eval_batch


def refuse(directory: str) -> None:
    """A filesystem like a mounted bucket: objects below `directory` can only be written whole."""
    root = os.path.realpath(directory) + os.sep

    def below(path: Any) -> bool:
        return not isinstance(path, int) and (os.path.realpath(os.fspath(path)) + os.sep).startswith(root)

    def guarded(real: Callable) -> Callable:
        def call(source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            if below(source) or below(target):
                raise PermissionError(1, "Operation not permitted", str(source))
            return real(source, target, *args, **kwargs)

        return call

    for name in ("rename", "replace", "renames", "link"):
        setattr(os, name, guarded(getattr(os, name)))
    real_open, real_os_open = builtins.open, os.open

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if ("a" in mode or "+" in mode) and below(file):
            raise PermissionError(1, "Operation not permitted", str(file))
        return real_open(file, mode, *args, **kwargs)

    def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        changes = flags & (os.O_APPEND | os.O_RDWR) or (flags & os.O_WRONLY and not flags & os.O_TRUNC)
        if changes and below(path):
            raise PermissionError(1, "Operation not permitted", str(path))
        return real_os_open(path, flags, *args, **kwargs)

    import io

    builtins.open = io.open = open_
    os.open = os_open


def nan_from(step: int) -> None:
    """The loss that is differentiated is not a number from batch `step` on, as if an activation overflowed."""
    import jax.numpy as jnp

    from bertgpt_jax.training import step as module

    real = module.train_step

    def train_step(state: dict, batch: dict, **rest: Any) -> Any:
        bad = jnp.where(state["data_step"] >= step, jnp.nan, 1.0)
        weights = {name: batch[name] * bad for name in batch if name.endswith("weights")}
        return real(state, batch | weights, **rest)

    from bertgpt_jax.training import setup

    setup.train_step = train_step


def settled() -> None:
    """Saves are awaited."""
    from bertgpt_jax.training.checkpoint import Checkpoints

    real = Checkpoints.save

    def save(self: Checkpoints, *args: Any) -> bool:
        started = real(self, *args)
        self.wait()
        return started

    Checkpoints.save = save


def bad_batch(n: int) -> None:
    """Batch `n` of a stage cannot be read by this process."""
    from bertgpt_jax.batches.ramp import Ramped
    from bertgpt_jax.errors import DataError

    real = Ramped.batch

    def batch(self: Ramped, number: int, *args: Any) -> Any:
        if number == n:
            raise DataError(f"batch {n} cannot be read")
        return real(self, number, *args)

    Ramped.batch = batch


def main(faults: dict[str, Any], batch_log: Path, argv: list[str]) -> int:
    """Installs the faults and trains."""
    sys.modules["torch"] = None  # tensorboardX imports it where it is there, which takes longer than the run
    if "refuse" in faults:
        refuse(faults["refuse"])
    log_batches(batch_log)
    if "signal" in faults:
        send_signal(*faults["signal"])
    if "evaluation" in faults:
        send_signal_in_evaluation(*faults["evaluation"])
    if "nan_from" in faults:
        nan_from(faults["nan_from"])
    if faults.get("settled"):
        settled()
    if "bad_batch" in faults:
        bad_batch(faults["bad_batch"])
    from bertgpt_jax.commands.train import main as train

    return train(argv)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
