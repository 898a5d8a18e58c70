"""The training loop: eval -> save -> batch(n) -> step -> log, in that order, one file read from top to bottom."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.mixture import Mixture, parts_of
from bertgpt_jax.batches.pipeline import prefetch
from bertgpt_jax.batches.ramp import without_weight
from bertgpt_jax.errors import Diverged
from bertgpt_jax.evaluation import held_out
from bertgpt_jax.parallel.sharding import local_rows, padded_rows, place_batch
from bertgpt_jax.shapes import PyTree
from bertgpt_jax.training.checkpoint import Checkpoints
from bertgpt_jax.training.clock import Clock
from bertgpt_jax.training.exports import Exports
from bertgpt_jax.training.guards import PreemptionGuard
from bertgpt_jax.training.metrics import MetricWriter
from bertgpt_jax.training.profiling import Profiler
from bertgpt_jax.training.setup import Program, Stage, enter_stage

AHEAD = 2
"""Steps that are begun before their results are there. More gain nothing, and CPU devices that fall behind one another
by many give up on the slowest after 40 seconds (XLA's rendezvous)."""


class Loop:
    """Trains a state through the stages that are left.

    Attributes:
        step: batches drawn so far; the state's `data_step`.
        state: the newest state.
        stopped: the run was asked to stop, and a checkpoint of this step was saved.
        exports: directories for others, made beside the training.

    Args:
        program, stages: what to train.
        steps: for each stage its compiled (train steps by segment of its ramp, evaluation step).
        meta: what every checkpoint carries besides step, stage and metrics.
        moved: told of every step, batch of an evaluation and save (`watch.Watch.moved`).
        owed: metrics of the restored step, where the run was stopped before its evaluation could be logged with them.
    """

    def __init__(
        self,
        program: Program,
        stages: list[Stage],
        steps: list[tuple[dict[int, Callable], Callable]],
        state: PyTree,
        step: int,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        guard: PreemptionGuard,
        meta: dict[str, Any],
        moved: Callable[[int, str], None],
        owed: dict[str, float] | None = None,
    ):
        self.program, self.stages, self.compiled = program, stages, steps
        self.state, self.step, self.stopped = state, step, False
        self._checkpoints, self._writer, self._guard, self._meta = checkpoints, writer, guard, meta
        self._moved = moved
        self._execution = program.config.execution
        self._ahead: deque[jax.Array] = deque()
        self._pending: dict[str, Any] | None = owed  # metrics of the step that brought us to `self.step`
        self._evaluation: dict[str, float] = {}
        self._clock = Clock(stages[-1].stop)
        self._profiler = Profiler(self._execution.profile, checkpoints.workdir, writer.say)
        self.exports = Exports(self._execution.export, checkpoints)

    def run(self) -> None:
        """Until the last stage ends or the run is asked to stop."""
        with self._profiler:
            for stage, compiled in zip(self.stages, self.compiled, strict=True):
                owes = self.step == stage.stop and self._pending is not None  # stopped before its last evaluation
                if (self.step < stage.stop or owes) and not self.stopped:
                    self._run_stage(stage, *compiled)

    def _run_stage(self, stage: Stage, train_steps: dict[int, Callable], eval_step: Callable) -> None:
        if self.step == stage.start > 0:
            self.state = enter_stage(self.program, stage.config, self.state)
        batches = self._batches(stage)
        begin = self.step if self._pending is None else self.step - 1
        self._moved(self.step, "training")
        while True:
            fresh = self.step > begin  # what a restored or just entered step did before is not repeated
            # ------------------------------------------------ stop?
            if fresh and self._guard.should_stop(self.step):
                self._stop(stage)
                return
            # ------------------------------------------------ eval
            if fresh and self._due(self._execution.eval_every, stage):
                if not self._evaluate(stage, eval_step):
                    self._stop(stage)
                    return
            # ------------------------------------------------ save
            self.exports.poll()
            if fresh and (self._due(self._execution.save_every, stage) or self.exports.is_due(self.step)):
                self._save(stage)
                self.exports.wants(self.step)
            if self.step == stage.stop:
                batches.close()
                return
            # ------------------------------------------------ batch(n)
            self._profiler.before(self.step + 1)
            before, segment = self._pending, stage.segment(self.step)
            with self._clock.waiting_for_data():
                batch = next(batches)
            # ------------------------------------------------ step
            step = train_steps[stage.train.ramp.index(self.step - stage.start)]
            with jax.transfer_guard("disallow_explicit"):  # a copy to or from the device would wait for it
                self.state, self._pending = step(self.state, batch)
            self._profiler.after(self.step + 1, self._pending)
            self._wait_for_the_one_before_last()
            # ------------------------------------------------ log step n-1 while n runs
            if before is not None and self.step % self._execution.log_every == 0:
                self._log(stage, before)
            self.step += 1
            self._moved(self.step, "training")
            self._writer.tick(self.step)
            self._clock.tokens += segment.batch_size * segment.sequence_length

    # ---------------------------------------------------------------- the five things a step may do

    def _wait_for_the_one_before_last(self) -> None:
        """Lets no more than `AHEAD` steps wait for their turn: one is computed while the next is ready."""
        self._ahead.append(self._pending["loss"])
        if len(self._ahead) > AHEAD:
            jax.block_until_ready(self._ahead.popleft())

    def _due(self, every: int | None, stage: Stage) -> bool:
        return self.step == stage.stop or (every is not None and self.step % every == 0)

    def _batches(self, stage: Stage) -> Any:
        data, mesh = stage.train, self.program.mesh
        padded = {s.batch_size: padded_rows(s.batch_size, mesh) for s in data.ramp.segments}
        mine = {size: local_rows(mesh, rows) for size, rows in padded.items()}

        def build(n: int) -> dict[str, jax.Array]:
            size = data.ramp.segment(n).batch_size
            batch = data.batch(n, np.minimum(mine[size], size - 1))
            return place_batch(without_weight(batch, mine[size] >= size), mesh, padded[size])

        first, last = self.step - stage.start, stage.stop - stage.start
        return prefetch(build, first, last, self._execution.data_threads, self._execution.prefetch)

    def _log(self, stage: Stage, metrics: dict[str, Any], evaluation: Callable[[], dict | None] | None = None) -> bool:
        """Writes the row of `self.step`: a step's own metrics, never an average, so that any resume repeats it.

        Args:
            metrics: of the step; fetching them waits for it, so that the clock is right.
            evaluation: computes what is logged in the same row; if it gives None (asked to stop) nothing is written.

        Returns:
            whether the row was written.
        """
        values = step_values(jax.device_get(metrics))
        timing = self._clock.interval(
            self.step, flops_per_token(self.program, stage.segment(self.step - 1).sequence_length)
        )
        if values["optim/skipped"] >= self._execution.max_skipped:
            raise Diverged(
                f"{int(values['optim/skipped'])} updates in a row up to step {self.step} had a loss or gradient that "
                f"is not finite (train/loss {values['train/loss']}); lower schedule.peak, lengthen warmup_steps, or "
                "look at the batches; the last checkpoint is from before"
            )
        values |= self._seen()
        if self.step % self._execution.log_every == 0:
            self._writer.print(self.step, console_fields(values, timing))
        if evaluation is not None:
            result = evaluation()
            if result is None:
                return False
            values |= {f"eval/{name}": value for name, value in result.items()}
        self._writer.log(self.step, values, timing)
        return True

    def _evaluate(self, stage: Stage, eval_step: Callable) -> bool:
        """Evaluates the held-out split, logged beside the step's own metrics; False if asked to stop meanwhile."""
        limit = self._execution.eval_batches

        def evaluation() -> dict[str, float] | None:
            with self._clock.paused():
                held_out = stage.held_out
                return evaluate_stage(self.program, held_out, eval_step, self.state["params"], limit, self._stop_asked)

        if not self._log(stage, self._pending, evaluation):
            return False
        self._pending = None
        self._writer.join()
        self._evaluation = {name: value for name, value in self._writer.last.items() if name.startswith("eval/")}
        shown = ", ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in self._evaluation.items())
        self._writer.say(f"step {self.step:,} held out: {shown}")
        return True

    def _stop_asked(self) -> bool:
        """Whether to break off an evaluation; with several processes only between steps, where all agree."""
        self._moved(self.step, "evaluating")
        return jax.process_count() == 1 and self._guard.should_stop(self.step)

    def _save(self, stage: Stage, owed: dict[str, float] | None = None) -> None:
        if self._pending is not None and self.step % self._execution.log_every == 0:
            pending, self._pending = self._pending, None
            self._log(stage, pending)
        self._moved(self.step, "saving")
        with self._clock.paused():
            self._writer.join()
            evaluated = owed is None and self._due(self._execution.eval_every, stage)
            metrics = self._evaluation if evaluated else {}
            own = {"step": self.step, "stage": stage.config.name, "metrics": metrics, "owed": owed}
            self._checkpoints.save(self.state, self.step, self._meta | own)

    def _stop(self, stage: Stage) -> None:
        """Saves; a row that waits for its evaluation goes into the checkpoint, so that the resume writes it whole."""
        owed = None
        if self._pending is not None and self._due(self._execution.eval_every, stage):
            owed = {name: float(value) for name, value in jax.device_get(self._pending).items()}
            self._pending = None
        self._save(stage, owed)
        self.stopped = True

    def _seen(self) -> dict[str, float]:
        """Input positions of all batches up to `self.step`, padding included; of a mixture, what is of each corpus."""
        seen: dict[str, float] = {"train/tokens_seen": 0}
        for stage in self.stages:
            if stage.start >= self.step:
                break
            drawn = min(self.step, stage.stop) - stage.start
            seen["train/tokens_seen"] += stage.train.ramp.tokens_before(drawn)
            for name, counts in stage.train.seen_before(drawn).items():
                for what, count in counts.items():
                    key = f"data/{name}/{what}"
                    seen[key] = seen.get(key, 0) + count
        return seen


def evaluate_stage(
    program: Program,
    data: Dataset | Mixture,
    eval_step: Callable,
    params: PyTree,
    limit: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Held-out metrics of a stage (`held_out.means`), with perplexity and bits per byte for causal models.

    Of a mixture all rows together, then as `<name>/<metric>` those of each corpus; `limit` batches of each at most.
    """
    objective, rows = program.config.objective, local_rows(program.mesh, data.batch_size)
    parts = parts_of(data)
    sums: dict[str, held_out.Sums] = {}
    for name, part in parts.items():

        def batch(i: int, part: Dataset = part) -> dict[str, jax.Array]:
            return place_batch(part.eval_batch(i, rows), program.mesh, part.batch_size)

        count = part.eval_batches() if limit is None else min(limit, part.eval_batches())
        found = held_out.add_up(eval_step, params, count, batch, should_stop)
        if found is None:
            return None
        sums[name] = found
    result = held_out.means(sum(sums.values(), held_out.Sums()), objective)
    each = {name: held_out.means(found, objective) for name, found in sums.items()}
    if objective.kind == "causal_lm":
        result["perplexity"] = held_out.perplexity(result["loss"])
        result["bits_per_byte"] = held_out.bits_per_byte((each[name]["loss"], part) for name, part in parts.items())
    if isinstance(data, Mixture):
        result |= {f"{name}/{key}": value for name, found in each.items() for key, value in found.items()}
    return result


def flops_per_token(program: Program, length: int) -> tuple[float, float]:
    """Training FLOPs a token of rows of `length` with causal attention counted by half and in full."""
    scored = program.config.objective.scored_share(length)
    model = program.config.model
    return model.flops_per_token(length, scored, halved=True), model.flops_per_token(length, scored, halved=False)


def step_values(metrics: dict[str, Any]) -> dict[str, float]:
    """A step's metrics under the names they are logged with."""
    optimizer = ("learning_rate", "grad_norm", "param_norm", "skipped")
    return {f"{'optim' if name in optimizer else 'train'}/{name}": float(value) for name, value in metrics.items()}


def console_fields(values: dict[str, float], timing: dict[str, float]) -> dict[str, Any]:
    """The fields of a console line, named as they are shown."""
    names = {
        "train/loss": "loss",
        "train/mlm_loss": "mlm",
        "train/nsp_loss": "nsp",
        "train/sop_loss": "sop",
        "train/accuracy": "acc",
        "train/mlm_accuracy": "mlm acc",
        "train/nsp_accuracy": "nsp acc",
        "train/sop_accuracy": "sop acc",
        "optim/learning_rate": "lr",
        "optim/grad_norm": "grad",
        "throughput/tokens_per_second": "tok/s",
        "throughput/mfu": "mfu",
        "throughput/mfu_full_attention": "mfu full",
        "throughput/data_wait": "data",
        "throughput/eta_seconds": "eta",
    }
    both = values | timing
    return {shown: both[key] for key, shown in names.items() if key in both}
