"""One training update on fixed data, ours and a torch model's: same parameters, batch, optimizer and loss."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from bertgpt_jax.benchmarks.harness import Side
from bertgpt_jax.config import build
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.errors import DataError
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.training import setup
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import ExecutionConfig, Model, Objective, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant
from bertgpt_jax.transfer.load import Loaded, load_model

OPTIMIZER = AdamW(weight_decay=0.01, clip_norm=None)
RATE = 1e-4
AGREE = 1e-4
"""Largest relative difference of losses with which two sides still do the same work."""


class Trainer(Protocol):
    """Something that makes one update after another on a fixed batch."""

    name: str

    def update(self) -> float:
        """Makes an update; returns the loss before it. All of it is done when this returns."""


class Ours:
    """Our train step, as `training/run.py` compiles it, on one device.

    Args:
        model, params: as `load_model` gives them; dropout is taken out.
        batch: arrays of a whole batch.
        compute: dtype, attention path and the like.
    """

    def __init__(
        self,
        name: str,
        loaded: Loaded,
        objective: Objective,
        batch: dict[str, np.ndarray],
        compute: ComputeConfig,
    ):
        self.name = name
        rows, length = batch["tokens"].shape
        stage = StageConfig(
            steps=1, sequence_length=length, batch_size=rows, optimizer=OPTIMIZER, schedule=Constant(peak=RATE)
        )
        config = RunConfig(
            corpus=CorpusConfig(),
            model=without_dropout(loaded.model_config),
            objective=objective,
            stages=(stage,),
            execution=ExecutionConfig(compute=compute),
        )
        program = setup.make_program(config, make_mesh(MeshConfig(), jax.devices()[:1]))
        self._step = setup.lower_train_step(program, stage).compile()
        lies = jax.tree.map(lambda x: x.sharding, program.abstract_state["params"])
        params = jax.tree.map(jax.device_put, loaded.params, lies)
        self._state = program.init() | {"params": params}
        shapes = program.abstract_batch(stage)
        self._batch = {name: jax.device_put(batch[name].astype(x.dtype), x.sharding) for name, x in shapes.items()}

    def update(self) -> float:
        """One update."""
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        return float(metrics["loss"])


class Torch:
    """A transformers model that returns its own loss, with torch's fused AdamW.

    Args:
        model: copied; left as it is.
        inputs: keyword arguments of its forward pass, as arrays.
        compiled: by `torch.compile`.
    """

    def __init__(self, name: str, model: Any, inputs: dict[str, np.ndarray], compiled: bool):
        import torch

        self.name = name
        model = copy.deepcopy(model).train()
        groups: dict[bool, list[Any]] = {True: [], False: []}
        for path, parameter in model.named_parameters():
            plain = path.endswith("bias") or parameter.ndim == 1
            groups[not plain].append(parameter)
        self._optimizer = torch.optim.AdamW(
            [{"params": p, "weight_decay": OPTIMIZER.weight_decay * decays} for decays, p in groups.items()],
            lr=RATE, betas=(OPTIMIZER.b1, OPTIMIZER.b2), eps=OPTIMIZER.eps, fused=True,
        )  # fmt: skip
        self._model = torch.compile(model) if compiled else model
        self._inputs = {key: torch.as_tensor(value) for key, value in inputs.items()}

    def update(self) -> float:
        """One update."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._model(**self._inputs).loss
        loss.backward()
        self._optimizer.step()
        return loss.item()


def loaded_from(model: Any) -> Loaded:
    """Our parameters of a transformers model, by way of the directory it saves."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return load_model(directory)


def without_dropout(model: Model) -> Model:
    """The config with dropout rates 0, so that losses can be compared."""
    tree = model.model_dump(mode="json") | {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return build(type(model), tree, "model")


def agreed_losses(trainers: Sequence[Trainer], updates: int = 3) -> dict[str, list[float]]:
    """The losses of the first updates of each trainer, which must agree; also what compiles them.

    Raises:
        DataError: they differ by more than `AGREE`.
    """
    losses = {trainer.name: [trainer.update() for _ in range(updates)] for trainer in trainers}
    first = np.array(losses[trainers[0].name])
    for name, values in losses.items():
        apart = float(np.abs(np.array(values) / first - 1).max())
        if not apart <= AGREE:
            raise DataError(
                f"the losses of '{name}' are {values}, those of '{trainers[0].name}' {first.tolist()}: {apart:.1e} "
                f"apart, over {AGREE:.0e}; sides that do not do the same work are not compared"
            )
    return losses


def sides(trainers: Sequence[Trainer]) -> list[Side]:
    """A side for each trainer: one update a step."""
    return [
        Side(trainer.name, lambda trainer=trainer: trainer, lambda trainer: trainer.update()) for trainer in trainers
    ]
