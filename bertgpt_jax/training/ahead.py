"""Compiling a run's train step ahead of it, for devices that need not be here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from bertgpt_jax.corpus.kinds import open_tokenizer
from bertgpt_jax.errors import UserError
from bertgpt_jax.objectives.base import Objective
from bertgpt_jax.parallel.mesh import make_mesh
from bertgpt_jax.training.run_config import RunConfig, StageConfig, with_steps, with_vocabulary
from bertgpt_jax.training.setup import Program, lower_train_step, make_program

ASSUMED_ROWS = 10**6
"""Training rows of an epoch where there is no corpus to count; they reach the program as the end of schedules only."""


class Lowered(NamedTuple):
    """A train step that is traced and not compiled.

    Attributes:
        program: model, mesh, abstract state.
        stage: whose step it is, measured in steps.
        step: `.compile()` gives the executable, `.as_text()` the program before XLA.
    """

    program: Program
    stage: StageConfig
    step: Any


def stated_vocabulary(config: RunConfig) -> int | None:
    """What the tokenizer's config says of its size: that of a published one on this disk, else as large as it may be.

    None: nothing. A corpus that was prepared may have another.
    """
    tokenizer = config.corpus.tokenizer
    if tokenizer.path:
        try:
            return None if "://" in tokenizer.path else open_tokenizer(tokenizer).vocab_size
        except UserError:  # told to whoever opens the corpus
            return None
    return getattr(tokenizer, "vocab_size", None)


def assume_vocabulary(config: RunConfig) -> RunConfig:
    """A copy with a vocabulary; one left to the tokenizer is as large as the tokenizer's config allows."""
    return with_vocabulary(config, config.model.vocab_size or getattr(config.corpus.tokenizer, "vocab_size", 256))


def lower_step(
    config: RunConfig, devices: Sequence[jax.Device], stage: int = 0, objective: Objective | None = None
) -> Lowered:
    """The real train step of a stage, with the config's mesh over `devices`; reads no data and allocates nothing.

    Args:
        objective: in place of the config's, for comparisons.

    Raises:
        ConfigError: whatever would stop the run before its data is read.
    """
    config = assume_vocabulary(config)
    config = with_steps(config, [lambda length: ASSUMED_ROWS] * len(config.stages))
    program = make_program(config, make_mesh(config.execution.mesh, devices))
    return Lowered(program, config.stages[stage], lower_train_step(program, config.stages[stage], objective))
