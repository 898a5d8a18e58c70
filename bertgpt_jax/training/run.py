"""A training run from its config to its finish line."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
from etils import epath

from bertgpt_jax.corpus.mixture import CorpusMixture
from bertgpt_jax.corpus.reader import CorpusReader
from bertgpt_jax.errors import Diverged, Preempted, UserError
from bertgpt_jax.parallel import distributed
from bertgpt_jax.parallel.mesh import make_mesh
from bertgpt_jax.parallel.sharding import bytes_per_device
from bertgpt_jax.shapes import PyTree
from bertgpt_jax.training import exports, memory, processes, resume, setup, status, storage
from bertgpt_jax.training.checkpoint import Checkpoints, list_steps, read_meta
from bertgpt_jax.training.compilation import Compiler
from bertgpt_jax.training.data import check_enough
from bertgpt_jax.training.facts import shared_facts
from bertgpt_jax.training.fingerprint import state_fingerprint
from bertgpt_jax.training.guards import PreemptionGuard
from bertgpt_jax.training.heap import keep_freed_memory
from bertgpt_jax.training.loop import Loop
from bertgpt_jax.training.metrics import MetricWriter, duration
from bertgpt_jax.training.niceness import let_files_wait
from bertgpt_jax.training.rows import read_rows
from bertgpt_jax.training.run_config import RunConfig, StageConfig, with_steps, with_vocabulary
from bertgpt_jax.training.watch import Watch
from bertgpt_jax.training.workdir import cache_root, open_run_corpus, use_compilation_cache, write_description


@dataclasses.dataclass(frozen=True)
class Finish:
    """How a run ended.

    Attributes:
        step: of the final state.
        metrics: last value of each.
        checkpoint: newest step saved.
    """

    step: int
    metrics: dict[str, Any]
    checkpoint: int | None


class InitialParameters(Protocol):
    """Parameters to begin from (`transfer.initial`)."""

    label: str

    def place(self, fresh: PyTree) -> PyTree:
        """Freshly drawn, sharded parameters -> those to begin with, lying alike."""


def train(
    config: RunConfig,
    workdir_text: str,
    allow_change: tuple[str, ...] = (),
    *,
    from_step: int | None = None,
    debug: bool = False,
    initial: InitialParameters | None = None,
    check_devices: Callable[[], object] | None = None,
) -> Finish:
    """Trains `config` in a workdir, from its newest valid checkpoint if there is one.

    Args:
        allow_change: identity settings (dotted) that may differ from those the workdir was begun with.
        from_step: go on from this checkpoint instead; newer ones are set aside.
        debug: check the token ids of every batch.
        initial: parameters to begin from where the workdir has no checkpoint; None: drawn.
        check_devices: raises a user error where jax runs on other devices than were meant; called as soon as it may.

    Raises:
        ConfigError: before anything is written, for whatever can be known then.
        Preempted: asked to stop; a checkpoint was saved.
        Diverged: too many updates in a row were not finite.
    """
    begun = time.perf_counter()
    let_files_wait()
    call = {"workdir": workdir_text, "from_step": from_step, "allow_change": list(allow_change)}
    distributed.initialize(distributed.from_environment(config.execution.distributed), shared_facts(config, call))
    if check_devices is not None:
        _check_here(check_devices)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    workdir = storage.workdir_path(workdir_text)
    mesh = make_mesh(config.execution.mesh)
    setup.check_settings(config, mesh)
    processes.on_primary(storage.check_writable, workdir)
    exports.check(config.execution.export, workdir)
    if from_step is not None:
        processes.on_primary(read_meta, workdir, from_step)
    processes.on_primary(resume.check_identity, workdir, {"config": resume.identity(config)}, allow_change, from_step)
    programs = use_compilation_cache(config, workdir)

    first_step = processes.on_primary(_expected_step, workdir) if from_step is None else from_step
    with Compiler(mesh, first_step, programs) as compiler:
        compiler.start_early(config)
        gc.enable()  # a command may have kept it off until here
        corpus = open_run_corpus(config, workdir)
        config = with_vocabulary(config, corpus.vocab_size)
        compiler.start(config)
        datasets = setup.make_datasets(config, corpus, cache_root(workdir), debug)
        config = with_steps(config, [train.rows_per_epoch for train, _ in datasets])
        stages = setup.make_stages(config, datasets)
        check_enough(config.corpus, [stage.train for stage in stages], [stage.config.steps for stage in stages])
        identity = resume.run_identity(config, corpus.fingerprint, corpus.tokenizer.sha256)
        distributed.agree(identity)
        changed = processes.on_primary(resume.check_identity, workdir, identity, allow_change, from_step)
        compiler.start(config)

        with status.acquire(workdir), PreemptionGuard() as guard:
            session = _Session(compiler, stages, corpus, workdir, identity, guard, from_step, initial)
            for path, (old, new) in changed.items():
                why = "added" if resume.is_added(path, (old, new)) else "changed by --allow-change"
                session.say(f"{why}: {path}: {old!r} -> {new!r}")
            return session.run(begun)


def _check_here(check: Callable[[], object]) -> None:
    """Calls `check`; where it fails, this process leaves alone: the others cannot be told without devices."""
    try:
        check()
    except UserError as error:
        if jax.distributed.is_initialized():
            distributed.leave_alone(error.exit_code, 0.0)
        raise


def _expected_step(workdir: epath.Path) -> int:
    """The step from which the run will go on, if its newest checkpoint is whole."""
    return max(list_steps(workdir), default=0)


class _Session:
    """What one process does between taking the lock and letting go of it."""

    def __init__(
        self,
        compiler: Compiler,
        stages: list[setup.Stage],
        corpus: CorpusReader | CorpusMixture,
        workdir: epath.Path,
        identity: dict[str, Any],
        guard: PreemptionGuard,
        from_step: int | None,
        initial: InitialParameters | None,
    ):
        self.from_step, self.initial = from_step, initial
        self.compiler, self.program = compiler, compiler.program
        self.stages, self.corpus, self.workdir, self.guard = stages, corpus, workdir, guard
        self.identity = identity
        self.checkpoints = Checkpoints(workdir, self.program.config.execution.keep)

    def say(self, text: str) -> None:
        """A line on the console of the first process."""
        if processes.is_primary():
            print(text, flush=True)

    def run(self, begun: float) -> Finish:
        """Restores or initialises, trains, and writes how it ended."""
        try:
            state, meta = self._start_state()
        except Exception as error:
            raise memory.explained(error, self.program, self._shape_at(self.compiler.first_step))  # noqa: B904
        if processes.is_primary():  # only now: a checkpoint that does not fit leaves the workdir as it was
            write_description(self.workdir, self.program.config, self.identity, self.corpus)
        step, owed = (meta["step"], meta.get("owed")) if meta else (0, None)
        if owed and processes.on_primary(_has_row, self.workdir, step):
            owed = None  # an earlier resume has written it; the checkpoint is still the same
        self._describe(step, meta)
        writer = MetricWriter(
            self.workdir,
            restored_step=step - bool(owed) if meta else None,  # a row that is owed is written anew
            total_steps=self.stages[-1].stop,
            wandb_project=self.program.config.execution.wandb_project,
        )
        loop: Loop | None = None
        reason: status.Reason = "failed"
        failure: Exception | None = None
        try:
            with self._watch(step, writer) as watch:
                if step >= self.stages[-1].stop and not owed:
                    self.say(f"nothing to do: '{self.workdir}' is at step {step:,} of {self.stages[-1].stop:,}")
                    reason = "finished"
                    return Finish(step, writer.last, self.checkpoints.latest())
                watch.doing("compiling")
                compiled = self.compiler.steps(step - bool(owed), self.say)
                processes.meet("compiled")
                loop = Loop(
                    self.program, self.stages, compiled, state, step, self.checkpoints, writer, self.guard,
                    self._meta(), watch.moved, owed,
                )  # fmt: skip
                loop.run()
                reason = (self.guard.reason or "preempted") if loop.stopped else "finished"
        except Exception as error:
            error = memory.explained(error, self.program, self._shape_at(loop.step if loop else step))
            failure = distributed.as_peer_error(error)
            reason = "diverged" if isinstance(failure, Diverged) else "failed"
            raise failure  # noqa: B904 (it is `error` itself, or caused by it)
        finally:
            self._end(loop.step if loop else step, reason, writer, _usable_state(loop) if loop else state, failure)
        return self._finish(loop, writer, begun)

    # ---------------------------------------------------------------- start

    def _start_state(self) -> tuple[PyTree, dict[str, Any] | None]:
        """Restore policy: 1 the checkpoint asked for; 2 the workdir's newest valid one; 3 `init_from`; 4 fresh."""
        if self.from_step is not None:
            return self.checkpoints.rewind(self._abstract_at(self.from_step), self.from_step)
        found = self.checkpoints.restore_latest_valid(self._abstract_at)
        if found is not None:
            return found
        state = self.compiler.draw()
        if self.initial is not None:
            self.say(f"parameters from {self.initial.label}")
            state = state | {"params": self.initial.place(state["params"])}
        return state, None

    def _abstract_at(self, step: int) -> PyTree:
        """The abstract state of a checkpoint of that step: that of the stage which ends there, if one does."""
        stage = next((stage for stage in self.stages if step <= stage.stop), self.stages[-1])
        return setup.stage_state(self.program, stage.config)

    def _shape_at(self, step: int) -> StageConfig:
        """The stage of a step, with the shape of its batch there."""
        stage = next((stage for stage in self.stages if step < stage.stop), self.stages[-1])
        return setup.shape_config(self.program, stage.config, stage.segment(max(step, stage.start)))

    def _describe(self, step: int, meta: dict[str, Any] | None) -> None:
        program, execution = self.program, self.program.config.execution
        lies = jax.tree.map(lambda x: x.sharding, program.abstract_state)
        held = bytes_per_device(program.abstract_state, lies) / 2**20
        mesh = ",".join(f"{axis}={size}" for axis, size in program.mesh.shape.items() if size > 1) or "data=1"
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        self.say(
            f"{program.config.model.kind} {program.parameters / 1e6:.2f}M parameters, {program.config.objective.kind}, "
            f"{devices}, mesh {mesh}, {execution.compute.dtype}, state {held:.0f} MiB a device"
        )
        for stage in self.stages:
            steps, segments = stage.stop - stage.start, stage.train.ramp.segments
            shapes = [f"{segment.batch_size} x {segment.sequence_length}" for segment in segments]
            self.say(
                f"stage {stage.config.name}: {steps:,} steps = {stage.train.ramp.tokens_before(steps):,} tokens = "
                f"{stage.train.epochs_before(steps):.2f} epochs; batch {' -> '.join(shapes)}"
                + (f" in {stage.config.microbatches} parts" if stage.config.microbatches > 1 else "")
            )
            for name, seen in stage.train.seen_before(steps).items():
                self.say(f"  corpus {name}: {seen['tokens']:,} tokens = {seen['epochs']:.2f} epochs")
        unused = program.config.model.vocab_size - self.corpus.vocab_size
        if unused:
            self.say(
                f"warning: model.vocab_size {program.config.model.vocab_size:,} leaves {unused:,} rows that the "
                f"tokenizer's {self.corpus.vocab_size:,} ids never use"
            )
        if storage.filesystem(self.workdir) in ("tmpfs", "ramfs"):
            self.say(f"warning: workdir '{self.workdir}' is in memory (tmpfs): a restart of the machine loses it")
        if meta:
            self.say(
                f"resumed at step {step:,} (stage {meta['stage']}, "
                f"fingerprint {meta['state_fingerprint'][:12]} verified)"
            )
        else:
            self.say(f"fresh start in {self.workdir}")

    def _meta(self) -> dict[str, Any]:
        config = self.program.config
        return {
            "config": config.model_dump(mode="json"),
            "identity": self.identity,
            "identity_hash": resume.identity_hash(self.identity),
            "tokenizer_sha256": self.corpus.tokenizer.sha256,
            "data_fingerprint": self.corpus.fingerprint,
            "evaluation_fingerprints": {s.config.name: s.held_out.eval_fingerprint() for s in self.stages},
            "mesh": dict(self.program.mesh.shape),
        }

    # ---------------------------------------------------------------- end

    def _watch(self, step: int, writer: MetricWriter) -> Watch:
        """Refreshes the status while the run goes on, and ends it where it hangs."""

        def report(progress: dict[str, Any], message: str) -> None:
            self._status(watch.step, "stalled" if message else "running", writer, None, message, progress)

        minutes = self.program.config.execution.stall_minutes
        watch = Watch(self.workdir, step, self.stages[-1].stop, minutes, report)
        return watch

    def _status(
        self,
        step: int,
        reason: status.Reason,
        writer: MetricWriter,
        state: PyTree | None,
        message: str = "",
        progress: dict[str, Any] | None = None,
    ) -> None:
        status.write_status(
            self.workdir,
            step=step,
            reason=reason,
            latest=self.checkpoints.latest(),
            best=self.checkpoints.best(),
            state_fingerprint=None if state is None else state_fingerprint(state),
            metrics=dict(writer.last),
            message=message,
            progress=progress,
        )

    def _end(
        self, step: int, reason: status.Reason, writer: MetricWriter, state: PyTree | None, failure: Exception | None
    ) -> None:
        """Closes everything and writes the status."""
        writer.close()
        message = str(failure or "")
        if failure and not isinstance(failure, UserError):
            message = f"{type(failure).__name__}: {failure}"
        if reason == "failed" and jax.process_count() > 1:
            # perhaps this process alone: what needs the others, who are somewhere else, would never return
            self._status(step, reason, writer, None, message)
            distributed.leave_alone(failure.exit_code if isinstance(failure, UserError) else 70)
        else:
            self.checkpoints.close()
            self._status(step, reason, writer, _made(state) if failure else state, message)

    def _finish(self, loop: Loop, writer: MetricWriter, begun: float) -> Finish:
        if not loop.stopped:
            loop.exports.finish()
        took = duration(time.perf_counter() - begun)
        saved = self.checkpoints.latest()
        if loop.stopped:
            raise Preempted(
                f"asked to stop at step {loop.step:,} after {took}; saved to '{self.workdir}': the same command goes on"
            )
        loss = writer.last.get("eval/loss")
        self.say(
            f"finished {loop.step:,} steps in {took}: held-out loss {loss:.4f}" if loss is not None else "finished"
        )
        self.say(f"  checkpoints, metrics.jsonl, STATUS.json, TensorBoard events: {self.workdir}")
        self.say(f"  newest checkpoint {saved}, best {self.checkpoints.best()}")
        self.say(f"  next: bertgpt evaluate {self.workdir}   (in a checkout: python tools/evaluate.py {self.workdir})")
        self.say(f"        bertgpt curve {self.workdir} --out curve.png")
        return Finish(loop.step, writer.last, saved)


def _has_row(workdir: epath.Path, step: int) -> bool:
    return any(row["step"] == step for row in read_rows(workdir))


def _made(state: PyTree | None) -> PyTree | None:
    """The state, or None if there was no memory to make it: then that is what failed, and is to be told."""
    try:
        return jax.block_until_ready(state)
    except jax.errors.JaxRuntimeError:
        return None


def _usable_state(loop: Loop) -> PyTree | None:
    """The loop's state, or None if the step that failed had already taken its buffers."""
    return None if any(leaf.is_deleted() for leaf in jax.tree.leaves(loop.state)) else loop.state
