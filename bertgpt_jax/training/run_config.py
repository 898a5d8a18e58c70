"""The config of a run: what is trained (identity), stage by stage, and how it is executed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from bertgpt_jax.batches.ramp import Ramp
from bertgpt_jax.config import ADDED, EXECUTION, Config, build
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.corpus.mixture import MixtureConfig
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.pipeline import PipelineConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm import MaskedLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.parallel.distributed import DistributedConfig
from bertgpt_jax.parallel.mesh import MeshConfig
from bertgpt_jax.training.optim import AdamW, Optimizer
from bertgpt_jax.training.schedules import Linear, Schedule

Model = Annotated[BertConfig | GptConfig, Field(discriminator="kind")]
Objective = Annotated[MaskedLMNSP | MaskedLM | CausalLM, Field(discriminator="kind")]
Corpora = Annotated[
    Annotated[CorpusConfig, Tag("single")] | Annotated[MixtureConfig, Tag("mixture")],
    Discriminator(lambda v: v.get("kind", "single") if isinstance(v, dict) else getattr(v, "kind", "single")),
]
"""One corpus (its `kind` may be left out, as in configs from before there were mixtures), or several."""


class StageConfig(Config):
    """One stretch of training: its length, batch shape, optimizer and learning rate.

    Exactly one of `steps`, `tokens`, `epochs` gives its length. Parameters always carry over from the stage before;
    optimizer moments do unless `reset_optimizer`.

    A ramp is a tuple of (first step, value), steps counted in the stage and beginning with 0, that ends with the
    stage's own value: `batch_ramp=((0, 16), (1000, 32))` with `batch_size=32`. Schedule and rows go on across it; only
    a new sequence length begins an epoch of its own, as its rows are cut anew. Evaluation is at the stage's own shape.
    """

    name: str = Field(default="pretrain", pattern=r"^[A-Za-z0-9_-]+$")
    steps: Annotated[int | None, EXECUTION] = Field(default=None, ge=1, description="updates")
    tokens: Annotated[int | None, EXECUTION] = Field(
        default=None, ge=1, description="input positions, padding included"
    )
    epochs: Annotated[float | None, EXECUTION] = Field(default=None, gt=0, description="passes over the training split")
    sequence_length: int = Field(ge=8)
    batch_size: int = Field(ge=1, description="rows of the global batch")
    batch_ramp: Annotated[tuple[tuple[int, int], ...], ADDED] = Field(default=(), description="smaller batches first")
    length_ramp: Annotated[tuple[tuple[int, int], ...], ADDED] = Field(default=(), description="shorter rows first")
    microbatches: Annotated[int, EXECUTION] = Field(
        default=1, ge=1, description="the batch is computed in this many parts; smaller ones of a ramp in fewer"
    )
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Linear()
    reset_optimizer: bool = False

    @model_validator(mode="after")
    def _one_length(self) -> StageConfig:
        given = {k: v for k in ("steps", "tokens", "epochs") if (v := getattr(self, k)) is not None}
        if len(given) != 1:
            raise ValueError(f"stage '{self.name}' has {given or 'no length'}; give one of steps, tokens, epochs")
        end = getattr(self.schedule, "total_steps", None) or self.steps
        if hasattr(self.schedule, "total_steps") and end is not None and self.schedule.warmup_steps >= end:
            raise ValueError(
                f"stage '{self.name}': warmup_steps {self.schedule.warmup_steps} must be below its {end} steps"
            )
        return self

    @model_validator(mode="after")
    def _ramps_end_here(self) -> StageConfig:
        for name, least in (("batch_size", 1), ("sequence_length", 8)):
            key = "batch_ramp" if name == "batch_size" else "length_ramp"
            ramp = getattr(self, key)
            steps, values = [step for step, _ in ramp], [value for _, value in ramp]
            problem = ""
            if ramp and (steps[0] != 0 or steps != sorted(set(steps))):
                problem = f"its steps {steps} must begin with 0 and increase"
            elif ramp and min(values) < least:
                problem = f"{name} {min(values)} must be at least {least}"
            elif ramp and values[-1] != getattr(self, name):
                problem = f"it ends with {values[-1]}, and the stage's {name} is {getattr(self, name)}"
            if problem:
                raise ValueError(f"stage '{self.name}': {key}: {problem}")
        return self

    def ramp(self) -> Ramp:
        """The shapes of the stage's batches, of which most stages have one."""
        return Ramp(self.batch_ramp or ((0, self.batch_size),), self.length_ramp or ((0, self.sequence_length),))


class ExtendConfig(Config):
    """How a run that begins from other parameters (`init_from`) may differ from them; what is new is drawn as usual."""

    max_positions: int | None = Field(default=None, ge=1, description="a longer position table; its old rows stay")
    new_tokenizer: bool = Field(
        default=False,
        description="another tokenizer than the model's; one that only adds ids behind the old needs no asking",
    )


class ExportConfig(Config):
    """Hugging Face directories that a run writes into `WORKDIR/export`, each by a process of its own."""

    every: int | None = Field(default=None, ge=1, description="steps between `step-N` directories (and checkpoints)")
    at_end: bool = Field(default=False, description="`final`, of the best checkpoint")
    dtype: Literal["float32", "bfloat16"] = "float32"


class ProfileConfig(Config):
    """Steps traced into `WORKDIR/profile`; the signal SIGUSR1 asks a running process for as many."""

    first_step: int | None = Field(default=None, ge=1, description="the first of them; null: only when asked to")
    steps: int = Field(default=5, ge=1)


class ExecutionConfig(Config):
    """How the run is computed, logged and saved; every field may change on resume."""

    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()
    pipeline: PipelineConfig = PipelineConfig()
    distributed: DistributedConfig = DistributedConfig()
    shard_optimizer: bool = Field(
        default=False,
        description="replicas (mesh.data) share the optimizer's state (ZeRO-1): gradients are summed into parts, each "
        "replica updates its part of the parameters, and the new parameters are gathered",
    )
    log_every: int = Field(default=10, ge=1, description="steps between rows of metrics.jsonl")
    eval_every: int | None = Field(
        default=None, ge=1, description="steps between evaluations; always one at a stage's end"
    )
    eval_batches: int | None = Field(
        default=None, ge=1, description="at most this many; null: the whole held-out split"
    )
    save_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints; always one at a stage's end"
    )
    keep: int = Field(default=2, ge=1, description="newest checkpoints kept, besides the best")
    max_skipped: int = Field(
        default=5, ge=1, description="updates in a row that may be non-finite before the run stops"
    )
    stall_minutes: float | None = Field(
        default=30, gt=0, description="without a step, save or batch of evaluation, until a hanging run ends (exit 76)"
    )
    data_threads: int = Field(default=2, ge=0)
    prefetch: int = Field(default=4, ge=1, description="batches built ahead")
    wandb_project: str | None = Field(default=None, min_length=1, description="also log there (extra `wandb`)")
    compilation_cache: str = Field(
        default="auto",
        min_length=1,
        description="where compiled programs are kept: beside the workdir (auto), nowhere (off), or a directory, which "
        "nobody else may write (jax runs what lies there)",
    )
    profile: ProfileConfig = ProfileConfig()
    export: ExportConfig = ExportConfig()
    general_text: str = Field(
        default="", description="with init_from: other text on which before and after are compared (a corpus, `stdlib`)"
    )


class RunConfig(Config):
    """A whole run. Identity is everything but the fields marked as execution; it is hashed into every checkpoint."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    corpus: Corpora
    model: Model
    objective: Objective
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    dropout_prng: Annotated[Literal["threefry", "philox", "rbg"], ADDED] = Field(
        default="threefry",
        description="what draws dropout masks: threefry the same on every mesh; philox for one device (a GPU); rbg "
        "(fastest on TPUs, slowest on GPUs) other masks on every mesh",
    )
    init_from: Annotated[str, ADDED] = Field(
        default="",
        description="a workdir or Hugging Face directory to begin from: its sizes and tokenizer replace the config's",
    )
    extend: Annotated[ExtendConfig, ADDED] = ExtendConfig()
    execution: Annotated[ExecutionConfig, EXECUTION] = ExecutionConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        problems = [*_objective_problems(self), *_stage_problems(self)]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _objective_problems(config: RunConfig) -> list[str]:
    model, objective = config.model, config.objective
    needed = "gpt" if objective.kind == "causal_lm" else "bert"
    if model.kind != needed:
        return [f"objective.kind = '{objective.kind}' needs model.kind = '{needed}', not '{model.kind}'"]
    if objective.kind == "masked_lm_nsp" and not model.next_sentence_head:
        return ["objective.kind = 'masked_lm_nsp' needs model.next_sentence_head = true"]
    if objective.kind == "masked_lm_nsp" and model.type_vocab_size < 2:
        return [f"objective.kind = 'masked_lm_nsp' needs model.type_vocab_size >= 2, not {model.type_vocab_size}"]
    return []


def _stage_problems(config: RunConfig) -> list[str]:
    problems = []
    names = [stage.name for stage in config.stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        problems.append(f"two stages are called '{twice[0]}'; names must differ")
    for before, stage in zip((None, *config.stages), config.stages, strict=False):
        lengths = [segment.sequence_length for segment in stage.ramp().segments]
        if max(lengths) > config.model.max_positions:
            problems.append(
                f"stage '{stage.name}': sequence_length {max(lengths)} exceeds "
                f"model.max_positions {config.model.max_positions}"
            )
        if config.objective.kind == "masked_lm_nsp" and min(lengths) < 16:
            problems.append(f"stage '{stage.name}': sentence pairs need sequence_length >= 16, not {min(lengths)}")
        changed = before is not None and before.optimizer.state_kind != stage.optimizer.state_kind
        if changed and not stage.reset_optimizer:
            problems.append(
                f"stage '{stage.name}': optimizer '{stage.optimizer.state_kind}' cannot take over the moments of "
                f"'{before.optimizer.state_kind}'; set reset_optimizer=true"
            )
    return problems


def with_changes(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """A validated copy with top-level trees replaced (`model_copy(update=)` would skip validation)."""
    return build(RunConfig, config.model_dump(mode="json") | changes, "config")


def execution_here(config: RunConfig) -> dict[str, Any]:
    """How a run's model is evaluated on this machine's devices, which may be others than it was trained on."""
    execution, asked = config.execution.model_dump(mode="json"), config.execution.compute
    here = {"matmul": "same", "attention": "reference" if asked.attention == "reference" else "auto"}
    return execution | {"mesh": MeshConfig().model_dump(), "compute": execution["compute"] | here}


def with_vocabulary(config: RunConfig, vocab_size: int) -> RunConfig:
    """A copy whose model has the tokenizer's vocabulary size where it left it open.

    Raises:
        ConfigError: the model's table is smaller than the tokenizer.
    """
    given = config.model.vocab_size
    if given is not None and given < vocab_size:
        raise ConfigError(f"model.vocab_size {given} is below the tokenizer's {vocab_size}; raise it or leave it null")
    return with_changes(config, {"model": config.model.model_dump(mode="json") | {"vocab_size": given or vocab_size}})


def with_steps(config: RunConfig, rows_per_epoch: Sequence[Callable[[int], int]]) -> RunConfig:
    """A copy whose stages are measured in steps and whose schedules know their end.

    Args:
        rows_per_epoch: for each stage: sequence length to the training rows of its first epoch.
    """
    stages = []
    for stage, rows in zip(config.stages, rows_per_epoch, strict=True):
        tree = stage.model_dump(mode="json")
        steps = stage_steps(stage, rows)
        tree |= {"steps": steps, "tokens": None, "epochs": None}
        if "total_steps" in tree["schedule"] and tree["schedule"]["total_steps"] is None:
            tree["schedule"]["total_steps"] = steps + stage.schedule.offset
        stages.append(tree)
    return with_changes(config, {"stages": stages})


def stage_steps(stage: StageConfig, rows_per_epoch: Callable[[int], int]) -> int:
    """Updates that the stage's length comes to, rounded up.

    Args:
        rows_per_epoch: sequence length to the training rows of its first epoch.
    """
    if stage.steps is not None:
        return stage.steps
    if stage.tokens is not None:
        return stage.ramp().batches_for(stage.tokens, lambda length: length)
    if not stage.length_ramp:
        return stage.ramp().batches_for(int(stage.epochs * rows_per_epoch(stage.sequence_length)), lambda length: 1)
    return stage.ramp().batches_for(Fraction(stage.epochs), lambda length: Fraction(1, rows_per_epoch(length)))
