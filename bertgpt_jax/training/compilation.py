"""Compiles the steps of a run while its data are prepared and its state is read: both take minutes at their worst."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.shapes import PyTree
from bertgpt_jax.training import kept, memory, setup
from bertgpt_jax.training.ahead import stated_vocabulary
from bertgpt_jax.training.run_config import RunConfig, StageConfig, with_steps, with_vocabulary

Compiled = tuple[dict[int, Callable] | None, Callable | None]
"""For a stage: segment of its ramp -> train step, and the evaluation step; (None, None) if it is over."""


class Compiler:
    """Compiles one program after another in a thread of its own; what is asked for is waited for.

        with Compiler(mesh, first_step) as compiler:
            compiler.start_early(config)
            compiler.start(config)   # as soon as the config says everything; again whenever more is known
            ...
            compiler.steps(step, print)

    Args:
        first_step: the step at which the run will probably go on; stages before it are not compiled.
        directory: where programs are kept for the next start (`kept`); None: nowhere.

    Attributes:
        first_step: as given.
        program: what is compiled; None before `start` knew enough.
    """

    def __init__(self, mesh: Mesh, first_step: int = 0, directory: Path | None = None):
        self.program: setup.Program | None = None
        self.first_step, self._mesh = first_step, mesh
        self._thread = ThreadPoolExecutor(1, "compiler")
        self._tasks: dict[tuple[str, StageConfig], Future[_Made]] = {}
        self._given_up = threading.Event()
        # Processes that compile together may wait for one another in the compiler: what one begins, all finish.
        self._alone = jax.process_count() == 1
        self._directory = directory if self._alone else None
        self._drawn: Future[PyTree | None] | None = None
        self._read: list[str] = []

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._give_up()
        if isinstance(error, jax.errors.JaxRuntimeError):
            kept.discard(self._directory, self._read)

    def start_early(self, config: RunConfig) -> None:
        """`start` before the data are there; with the vocabulary that the tokenizer's config states, if it must be.

        Whatever that leads to, `start` decides anew when the vocabulary is known: a wrong guess costs time alone, and
        what it would raise is left to the truth.
        """
        if config.model.vocab_size is not None:
            self.start(config)
            return
        size = stated_vocabulary(config) if self._alone else None
        if size is not None:
            with contextlib.suppress(ConfigError):
                self.start(with_vocabulary(config, size), guessed=True)

    def start(self, config: RunConfig, guessed: bool = False) -> bool:
        """Begins to compile if the config says all that programs depend on, which may be before its data are there.

        Args:
            guessed: the vocabulary is; nothing is warned of that depends on it.

        Returns:
            whether it does: the vocabulary's size must be known, and no stage be measured in epochs.

        Raises:
            ConfigError: as `setup.make_program`.
        """
        if config.model.vocab_size is None or any(stage.epochs is not None for stage in config.stages):
            return False
        config = with_steps(config, [_no_epochs] * len(config.stages))
        if self.program is not None and self.program.config == config:
            return True
        if self._tasks:  # of a config that turned out otherwise
            self._give_up()
            self._thread = ThreadPoolExecutor(1, "compiler")
        self.program = setup.make_program(config, self._mesh, guessed)
        if self.first_step == 0 and not guessed:
            self._drawn = self._thread.submit(self._draw_at_once, self.program)
        for first, stage in self._stages():
            if self.first_step < first + stage.steps:
                for shape in dict.fromkeys(self._shapes(stage, self.first_step - first).values()):
                    self._submit("train", shape)
                self._submit("eval", stage)
        return True

    def _give_up(self) -> None:
        """Lets go of all that was begun; of one program the compiler itself may still be at work."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._tasks.clear()
        self._drawn = None
        if self._alone:
            self._given_up.set()
            self._given_up = threading.Event()

    def draw(self) -> PyTree:
        """A fresh state; its program is made in the caller's thread, beside the others."""
        drawn, self._drawn = self._drawn, None  # whoever gets it gives it to the first step
        state = drawn.result() if drawn else None
        return self._make("state", self.program, None, self._given_up).program() if state is None else state

    def _draw_at_once(self, program: setup.Program) -> PyTree | None:
        """A fresh state, where an earlier start kept its program: it is drawn while the other programs are read."""
        made = self._kept("state", program, None)
        return made and made.program()

    def steps(self, step: int, say: Callable[[str], None]) -> list[Compiled]:
        """Waits for everything that a run going on at `step` needs, so that no later shape can fail after days.

        Raises:
            ConfigError: a step needs more memory than its devices have (`memory.check`).
        """
        found: list[Compiled] = []
        for start, stage in self._stages():
            if step >= start + stage.steps:
                found.append((None, None))
                continue
            shapes, made = self._shapes(stage, step - start), {}
            for shape in dict.fromkeys(shapes.values()):
                made[shape] = self._result("train", shape)
                memory.check(self.program, shape, made[shape].program)
                segment = stage.ramp().segments[next(i for i, other in shapes.items() if other == shape)]
                if shape.batch_size > segment.batch_size:
                    rows = f"batches of {segment.batch_size} rows are filled up to {shape.batch_size}"
                    say(f"{rows} with rows of weight 0")
                if len(shapes) > 1:
                    say(f"compiled batch {shape.batch_size} x {shape.sequence_length}")
            evaluation = self._result("eval", stage)
            found.append(({segment: made[shape].program for segment, shape in shapes.items()}, evaluation.program))
            say(_told(stage, [*made.values(), evaluation]))
        return found

    def _stages(self) -> Iterator[tuple[int, StageConfig]]:
        """Each stage after its first step."""
        start = 0
        for stage in self.program.config.stages:
            yield start, stage
            start += stage.steps

    def _shapes(self, stage: StageConfig, step: int) -> dict[int, StageConfig]:
        """Segment -> shape of its batches, for what is left of a stage at its step `step`."""
        segments = stage.ramp().segments
        first, last = stage.ramp().index(max(step, 0)), stage.ramp().index(stage.steps - 1)
        return {i: setup.shape_config(self.program, stage, segments[i]) for i in range(first, last + 1)}

    def _result(self, kind: str, shape: StageConfig) -> _Made:
        try:
            return self._submit(kind, shape).result()
        except Exception as error:
            raise memory.explained(error, self.program, shape)  # noqa: B904 (it is `error` itself, or caused by it)

    def _submit(self, kind: str, shape: StageConfig) -> Future[_Made]:
        if (kind, shape) not in self._tasks:
            self._tasks[kind, shape] = self._thread.submit(self._make, kind, self.program, shape, self._given_up)
        return self._tasks[kind, shape]

    def _make(self, kind: str, program: setup.Program, shape: StageConfig | None, given_up: threading.Event) -> _Made:
        made = self._kept(kind, program, shape)
        if made is not None:
            return made
        begun = time.perf_counter()
        lowered = _lower(kind, program, shape)
        if given_up.is_set():
            raise CancelledError
        found, is_new = kept.compiled(lowered)
        name = self._name(kind, program, shape)
        if name and is_new:
            with contextlib.suppress(RuntimeError):  # nobody waits for programs any more
                self._thread.submit(kept.save, self._directory, name, found)
        return _Made(found, time.perf_counter() - begun, False)

    def _name(self, kind: str, program: setup.Program, shape: StageConfig | None) -> str | None:
        return kept.key(kind, program.config, shape, program.mesh) if self._directory else None

    def _kept(self, kind: str, program: setup.Program, shape: StageConfig | None) -> _Made | None:
        """What an earlier start kept; None where there is none."""
        begun = time.perf_counter()
        name = self._name(kind, program, shape)
        found = kept.load(self._directory, name, program.mesh) if name else None
        if found is None:
            return None
        self._read.append(name)
        return _Made(found, time.perf_counter() - begun, True)


class _Made(NamedTuple):
    """A program, the seconds that it took, and whether an earlier start had kept it."""

    program: Any
    seconds: float
    read: bool


def _told(stage: StageConfig, made: list[_Made]) -> str:
    seconds = sum(one.seconds for one in made)
    if all(one.read for one in made):
        return f"read the programs of stage {stage.name}, kept by an earlier start, in {seconds:.1f} s"
    return f"compiled stage {stage.name} in {seconds:.1f} s"


def _lower(kind: str, program: setup.Program, shape: StageConfig | None) -> Any:
    if shape is None:
        return program.drawing.lower()
    return (setup.lower_train_step if kind == "train" else setup.lower_eval_step)(program, shape)


def _no_epochs(length: int) -> int:
    raise AssertionError(f"rows of {length} tokens were asked for, and no stage is measured in epochs")
