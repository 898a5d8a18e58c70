"""A trace of some steps, for people to look at: a window that the config names, or from when SIGUSR1 comes."""

from __future__ import annotations

import contextlib
import logging
import signal
import tempfile
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
from etils import epath

from bertgpt_jax.training import processes, storage
from bertgpt_jax.training.run_config import ProfileConfig

log = logging.getLogger(__name__)


class Profiler:
    """Traces windows of steps into `WORKDIR/profile/step-N`, N the first step of the window; one at a time.

    The config's window is traced by the first process, one asked for by a signal by the process that got it. A trace
    that cannot be made or written is a warning.

        with Profiler(config, workdir, print) as profiler:
            profiler.before(step)            # about to start `step`, counted from 1 as on the console
            ...
            profiler.after(step, metrics)    # it was started, and gives `metrics`
    """

    def __init__(self, config: ProfileConfig, workdir: epath.Path, say: Callable[[str], None]):
        self._config, self._workdir, self._say = config, workdir, say
        self._asked, self._previous = False, None
        self._first: int | None = None
        self._last = 0
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Profiler:
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGUSR1"):
            self._previous = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._first is not None:
            self._stop()
        if self._previous is not None:
            signal.signal(signal.SIGUSR1, self._previous)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def before(self, step: int) -> None:
        """Starts a window if one is due."""
        due = step == self._config.first_step and processes.is_primary()
        if self._first is None and (due or self._asked):
            self._asked = False
            with self._warning():
                self._directory = tempfile.TemporaryDirectory(prefix="bertgpt-profile-")
                options = jax.profiler.ProfileOptions()
                # following Python's calls in threads that come and go (files, batches, TensorBoard) may crash the run
                options.python_tracer_level = 0
                jax.profiler.start_trace(self._directory.name, profiler_options=options)
                self._first, self._last = step, step

    def after(self, step: int, metrics: Any) -> None:
        """Ends the window with its last step, for which it waits."""
        if self._first is not None:
            self._last = step
            if step - self._first + 1 >= self._config.steps:
                jax.block_until_ready(metrics)
                self._stop()

    def _stop(self) -> None:
        first, directory, self._first = self._first, self._directory, None
        place = self._workdir / "profile" / (f"step-{first}" + self._whose())
        with self._warning():
            jax.profiler.stop_trace()
            storage.copy_tree(epath.Path(directory.name), place)
            self._say(f"profiled steps {first:,} to {self._last:,}: {place}   (tensorboard --logdir {place})")
        directory.cleanup()

    def _whose(self) -> str:
        return "" if jax.process_count() == 1 else f"-process-{jax.process_index()}"

    @contextlib.contextmanager
    def _warning(self) -> Any:
        try:
            yield
        except Exception as error:
            log.warning("no profile of the steps from here on: %s; training goes on", error)
