"""Copies of the metrics for people to look at: TensorBoard events and, where asked for, Weights & Biases.

`metrics.jsonl` is the record; a tracker that fails costs one warning and never the run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from etils import epath

from bertgpt_jax.errors import ConfigError


def check_wandb(project: str | None) -> None:
    """Raises ConfigError where a project is asked for and wandb is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"execution.wandb_project = '{project}' needs wandb; run: pip install 'bertgpt_jax[wandb]', or set null"
        )


class Tracker(Protocol):
    """Takes numbers of a step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values by name; the same step may come twice (values, then rates)."""

    def close(self) -> None:
        """Writes what is left."""


class TensorBoard:
    """Event files in a local workdir; events of later steps of a killed run are hidden, as its rows are dropped.

    A thread of its own writes them, and begins with the first row: importing tensorboardX imports torch where that is
    installed, for seconds, which no first step should share its processors with.
    """

    def __init__(self, workdir: epath.Path, restored_step: int | None):
        self._thread = ThreadPoolExecutor(1, "tensorboard")
        self._directory = str(workdir)
        self._purge_step = None if restored_step is None else restored_step + 1
        self._last: Future[None] | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Raises what went wrong with values before."""
        if self._last is not None and self._last.done():
            self._last.result()
        self._last = self._thread.submit(self._add, step, dict(values))

    @functools.cached_property
    def _writer(self) -> Any:
        from tensorboardX import SummaryWriter

        return SummaryWriter(logdir=self._directory, purge_step=self._purge_step)

    def _add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._thread.shutdown()
        if self._last is not None:
            self._last.result()
            self._writer.close()


class WeightsAndBiases:
    """One run a workdir, resumed by an id made from its path; `global_step` is the x axis.

    wandb refuses steps that decrease, which a resume may bring, so its own step counter is left alone.
    The API key comes from the environment (WANDB_API_KEY), never from a config.
    """

    def __init__(self, workdir: epath.Path, project: str):
        import wandb

        name = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
        self._run = wandb.init(project=project, id=name, name=workdir.name, resume="allow")
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "global_step": step})

    def close(self) -> None:
        self._run.finish()
