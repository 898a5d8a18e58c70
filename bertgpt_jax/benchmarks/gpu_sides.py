"""Training steps that follow one another as in a run, with their data: one is always queued while one runs."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from bertgpt_jax.batches.examples import Batch
from bertgpt_jax.batches.pipeline import prefetch
from bertgpt_jax.benchmarks.gpu_cases import STEPS
from bertgpt_jax.objectives.base import Objective
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.parallel.sharding import place_batch
from bertgpt_jax.shapes import Params
from bertgpt_jax.training import memory, setup
from bertgpt_jax.training.ahead import lower_step
from bertgpt_jax.training.run_config import RunConfig


class Stepper(Protocol):
    """One side of a comparison.

    Attributes:
        name: `ours`, or the peer's.
        facts: what is known of it so far, JSON-ready: `loss` (of the first update), `first_step` seconds, bytes.
    """

    name: str
    facts: dict[str, Any]

    def start(self) -> None:
        """Prepares and makes the first update."""

    def update(self) -> Any:
        """Queues an update; returns what `wait` takes."""

    def wait(self, handle: Any) -> None:
        """Returns when that update is done."""

    def stop(self) -> None:
        """Lets go of all memory."""


def timed(side: Stepper, steps: int) -> np.ndarray:
    """Seconds of each of `steps` updates: the times between their ends. The device never waits for a look at the clock.

    Update n+1 is queued before the end of update n is waited for, as the training loop does with its log.
    """
    gc.collect()
    stamps, before = [time.perf_counter()], side.update()
    for _ in range(steps - 1):
        handle = side.update()
        side.wait(before)
        stamps.append(time.perf_counter())
        before = handle
    side.wait(before)
    return np.diff([*stamps, time.perf_counter()])


class Ours:
    """Our train step on the first device, compiled as a run compiles it.

    Args:
        batches: n -> a batch on the host; they are built and placed ahead by threads, as in a run.
        objective: in place of the run's, for comparisons.
        restart: compiles a second time, from the persistent cache, and times that too.
    """

    def __init__(
        self,
        name: str,
        config: RunConfig,
        batches: Callable[[int], Batch],
        objective: Objective | None = None,
        restart: bool = False,
    ):
        self.name, self.facts = name, {}
        self._config, self._build, self._objective, self._restart = config, batches, objective, restart

    def start(self) -> None:
        """Compiles, draws parameters and makes the first update."""
        self._mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        execution, rows = self._config.execution, self._config.stages[0].batch_size
        self._batches = prefetch(
            lambda n: place_batch(self._build(n), self._mesh, rows), 0, STEPS, execution.data_threads,
            execution.prefetch,
        )  # fmt: skip
        self._state: Any = None
        seconds = self._compiled_and_run()
        self.facts["first_step"] = {"cold": seconds}
        if self._restart:
            jax.clear_caches()
            self.facts["first_step"]["warm"] = self._compiled_and_run()

    def _compiled_and_run(self) -> float:
        """Seconds to trace, compile and run a step once; to draw parameters and wait for a batch are not counted."""
        begun = time.perf_counter()
        lowered = lower_step(self._config, jax.devices()[:1], objective=self._objective)
        self._step = lowered.step.compile()
        took = time.perf_counter() - begun
        self._state = lowered.program.init() if self._state is None else self._state
        batch = next(self._batches)
        jax.block_until_ready((self._state, batch))
        begun = time.perf_counter()
        self._state, metrics = self._step(self._state, batch)
        jax.block_until_ready(self._state)
        took += time.perf_counter() - begun
        self.facts.setdefault("loss", float(metrics["loss"]))
        self.facts["bytes"] = memory.step_bytes(self._step)
        return took

    def update(self) -> jax.Array:
        """Queues an update."""
        self._state, metrics = self._step(self._state, next(self._batches))
        return metrics["loss"]

    def wait(self, handle: jax.Array) -> None:
        """Returns when the update is done."""
        handle.block_until_ready()

    def stop(self) -> None:
        """Lets go of state and batches."""
        batches = getattr(self, "_batches", None)
        if batches is not None:
            batches.close()
        self._batches = self._state = self._step = None


def drawn_parameters(config: RunConfig) -> Params:
    """The parameters with which `Ours` begins, on the host."""
    program = setup.make_program(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    return jax.device_get(program.init()["params"])


@contextlib.contextmanager
def programs_kept_in(directory: Path) -> Iterator[None]:
    """jax's persistent compilation cache is `directory` meanwhile, and nothing that was compiled before is in it."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(directory), 0.5), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax looks at the setting once
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def short(error: BaseException) -> str:
    """The first line of an error, with its kind."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
