"""Exports while a run trains: each by a process of its own, from a checkpoint that is on disk; training never waits."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from etils import epath

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.training import processes, storage
from bertgpt_jax.training.checkpoint import Checkpoints
from bertgpt_jax.training.run_config import ExportConfig

log = logging.getLogger(__name__)

_EXPORT = "import sys; from bertgpt_jax.commands.export import main; sys.exit(main(sys.argv[1:]))"

_ON_THE_HOST = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
"""The exporting process leaves the accelerators to the run."""


class Exports:
    """Starts `WORKDIR/export/step-N` for checkpoints whose step is a multiple of `every`; one at a time.

    A failed export is a warning: the checkpoint is there, and the same command can be given by hand. What an
    interrupted run did not get to is made after it was resumed, as long as its checkpoint is kept.
    """

    def __init__(self, config: ExportConfig, checkpoints: Checkpoints):
        self._config, self._checkpoints = config, checkpoints
        primary = processes.is_primary()
        self._waiting = [step for step in checkpoints.steps() if primary and step and self.is_due(step)]
        self._running: tuple[int, subprocess.Popen[str]] | None = None

    def is_due(self, step: int) -> bool:
        """Whether `step` is to be exported, and so to be saved."""
        return self._config.every is not None and step % self._config.every == 0

    def wants(self, step: int) -> None:
        """Notes a step whose checkpoint is being saved."""
        if processes.is_primary() and self.is_due(step):
            self._waiting.append(step)

    def poll(self) -> None:
        """Starts the next export whose checkpoint is committed; returns at once."""
        if self._running is not None and self._running[1].poll() is not None:
            self._collect()
        if self._running is None and self._waiting and self._waiting[0] in self._checkpoints.steps():
            self._start(self._waiting.pop(0))

    def finish(self) -> None:
        """Makes what is left; called at the end of a run, after the last save is committed."""
        while self._waiting or self._running is not None:
            if self._running is not None:
                self._collect()
            self._waiting = [step for step in self._waiting if step in self._checkpoints.steps()]
            self.poll()

    def _start(self, step: int) -> None:
        out = directory(self._checkpoints.workdir, step)
        if out.exists():  # made before the run was interrupted
            return
        command = [sys.executable, "-c", _EXPORT, str(self._checkpoints.workdir), "--format", "hf"]
        command += ["--out", str(out), "--which", str(step), "--dtype", self._config.dtype]
        self._running = (
            step,
            subprocess.Popen(
                command, env=os.environ | _ON_THE_HOST, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ),
        )

    def _collect(self) -> None:
        """Waits for the export under way and says how it went."""
        assert self._running is not None
        (step, process), self._running = self._running, None
        said = process.communicate()[0].strip().splitlines()
        if process.returncode:
            log.warning("export of step %d failed: %s", step, said[-1] if said else f"exit code {process.returncode}")
        else:
            print(f"exported step {step:,} to {directory(self._checkpoints.workdir, step)}", flush=True)


def directory(workdir: epath.Path, step: int) -> Path:
    """Where the export of a step is or would be."""
    return Path(workdir) / "export" / f"step-{step}"


def check(config: ExportConfig, workdir: epath.Path) -> None:
    """Raises ConfigError where exports are asked for in a bucket."""
    if (config.every is not None or config.at_end) and not storage.is_local(workdir):
        raise ConfigError(f"execution.export writes into a local workdir only, not into '{workdir}'; export afterwards")
