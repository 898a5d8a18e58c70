"""One update: what it computes, what it leaves alone, what it gives away."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.base import Sums
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.training.optim import AdamW, BertAdam
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant, Linear
from bertgpt_jax.training.setup import lower_train_step, make_program
from bertgpt_jax.training.step import init_state, train_step


@dataclasses.dataclass(frozen=True)
class Roots:
    """A loss of one parameter vector, sum of weights x sqrt(w . x): finite at 0, where its gradient is not."""

    def coefficients(self) -> dict[str, float]:
        return {"roots": 1.0}

    def metric_parts(self) -> dict[str, str]:
        return {}

    def weights(self, batch):
        return {"roots": jnp.sum(batch["weights"])}

    def loss(self, model: Any, params, batch, carry: Any, key) -> Sums:
        roots = jnp.sqrt(batch["x"] @ params["kernel"])
        if key is not None and "noise" in batch:
            roots = roots * jax.random.uniform(key, roots.shape)
        return Sums({"roots": jnp.sum(roots * batch["weights"])}, {}, carry)


def step_of(optimizer, schedule=None, microbatches: int = 1, seed: int = 0):
    return jax.jit(
        partial(
            train_step, model=None, objective=Roots(), optimizer=optimizer,
            schedule=schedule or Constant(peak=0.1), microbatches=microbatches, seed=seed,
        )
    )  # fmt: skip


def rows(*values: float, weights=None, **more) -> dict[str, np.ndarray]:
    x = np.outer(values, [1.0, 2.0]).astype(np.float32)
    return {
        "x": x,
        "weights": np.ones(len(values), np.float32) if weights is None else np.array(weights, np.float32),
    } | more


def start(optimizer):
    return init_state({"kernel": jnp.array([1.0, 2.0])}, optimizer.build())


def test_one_update_by_hand() -> None:
    """The gradient of mean sqrt(w . x) at w = x = (1, 2) is x / (2 sqrt 5); then clip and BERT's first Adam step."""
    optimizer = BertAdam(clip_norm=0.1, weight_decay=0.5)
    state, metrics = step_of(optimizer)(start(optimizer), rows(1.0, 1.0))
    gradient = np.array([1.0, 2.0]) / (2 * np.sqrt(5))
    np.testing.assert_allclose(metrics["loss"], np.sqrt(5), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6)  # before clipping
    np.testing.assert_allclose(metrics["param_norm"], np.sqrt(5), rtol=1e-6)
    clipped = gradient * 0.1 / np.linalg.norm(gradient)
    update = 0.1 * clipped / (np.sqrt(0.001) * clipped + 1e-6) + 0.5 * np.array([1.0, 2.0])
    np.testing.assert_allclose(state["params"]["kernel"], np.array([1.0, 2.0]) - 0.1 * update, rtol=1e-5)
    assert set(metrics) == {"loss", "learning_rate", "grad_norm", "param_norm", "skipped"}
    assert all(value.dtype == jnp.float32 and value.shape == () for value in metrics.values())


def test_schedule_reads_the_steps_of_the_stage() -> None:
    optimizer = AdamW()
    step = step_of(optimizer, Linear(peak=1.0, warmup_steps=4, total_steps=100))
    state, rates = start(optimizer), []
    for _ in range(3):
        state, metrics = step(state, rows(1.0))
        rates.append(float(metrics["learning_rate"]))
    assert rates == [0.25, 0.5, 0.75]
    assert int(state["step"]) == int(state["data_step"]) == int(state["extras"]["stage_step"]) == 3


BAD = {
    "loss": rows(1.0, -1.0),  # the root of a negative number
    "gradient alone": rows(1.0, 0.0),  # loss finite, gradient infinite
    "weights": rows(1.0, 1.0, weights=[1.0, np.nan]),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_update_that_is_not_finite_is_left_out_and_counted(bad: str, microbatches: int) -> None:
    optimizer = AdamW()
    step = step_of(optimizer, microbatches=microbatches)
    before, _ = step(start(optimizer), rows(1.0, 2.0))
    if bad == "gradient alone":
        loss = np.sqrt(np.maximum(BAD[bad]["x"] @ np.asarray(before["params"]["kernel"]), 0)).mean()
        assert np.isfinite(loss)
    state = before
    for count in (1, 2):
        state, metrics = step(state, BAD[bad])
        assert float(metrics["skipped"]) == count == int(state["extras"]["skipped"])
    for name in ("params", "optimizer"):
        for mine, theirs in zip(jax.tree.leaves(state[name]), jax.tree.leaves(before[name]), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert int(state["step"]) == int(before["step"]) == 1 and int(state["extras"]["stage_step"]) == 1
    assert int(state["data_step"]) == 3, "the batch is spent"
    state, metrics = step(state, rows(1.0, 2.0))
    assert float(metrics["skipped"]) == 0 and int(state["step"]) == 2
    assert np.all(np.isfinite(state["params"]["kernel"]))


def test_parameters_that_would_overflow_are_left_out() -> None:
    """Loss and gradient are finite here; the rate times the decay is not."""
    optimizer = AdamW(weight_decay=1e30)
    before = start(optimizer)
    state, metrics = step_of(optimizer, Constant(peak=1e30))(before, rows(1.0, 2.0))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert float(metrics["skipped"]) == 1
    np.testing.assert_array_equal(state["params"]["kernel"], [1.0, 2.0])


@pytest.mark.parametrize(
    "optimizer",
    [AdamW(), AdamW(second_moment="factored"), BertAdam(clip_norm=None)],
    ids=lambda optimizer: optimizer.state_kind,
)
def test_whether_an_update_is_kept_is_known_before_it_is_made(optimizer) -> None:
    """Else the new state would be written, read for the verdict, and read and written once more to be kept or not.

    Of the traced step, what `skipped` depends on: no moment, and so no new moment or parameter.
    """
    state, batch = start(optimizer), rows(1.0, 2.0)
    traced = jax.make_jaxpr(step_of(optimizer), return_shape=True)(state, batch)
    names = ["/".join(str(getattr(k, "key", k)) for k in path) for path, _ in jax.tree.leaves_with_path(traced[1][0])]
    assert names.count("extras/skipped") == 1
    wanted = [name == "extras/skipped" for name in names] + [False] * len(traced[1][1])
    _, used = partial_eval.dce_jaxpr(traced[0].jaxpr, wanted)
    used = jax.tree.unflatten(jax.tree.structure((state, batch)), used)[0]
    assert used["params"]["kernel"] and used["extras"]["skipped"]
    assert len(jax.tree.leaves(used["optimizer"])) >= 2 and not any(jax.tree.leaves(used["optimizer"]))


def test_randomness_is_of_seed_batch_number_and_microbatch() -> None:
    optimizer = AdamW()
    batch = rows(1.0, 1.0, noise=np.zeros(2, np.float32))
    losses = {}
    for name, step, data_step in (
        ("first", step_of(optimizer), 0), ("again", step_of(optimizer), 0), ("later", step_of(optimizer), 1),
        ("other seed", step_of(optimizer, seed=1), 0), ("microbatches", step_of(optimizer, microbatches=2), 0),
    ):  # fmt: skip
        state = start(optimizer) | {"data_step": jnp.asarray(data_step, jnp.int32), "step": jnp.asarray(7, jnp.int32)}
        losses[name] = float(step(state, batch)[1]["loss"])
    assert losses["first"] == losses["again"]
    assert len({losses[name] for name in ("first", "later", "other seed", "microbatches")}) == 4


@pytest.fixture(scope="module")
def donated():
    """(program, compiled step) of a tiny GPT on two devices."""
    config = RunConfig(
        corpus=CorpusConfig(path="unused"),
        model=GptConfig(vocab_size=16, max_positions=8, num_layers=1, hidden_size=8, num_heads=2, intermediate_size=16),
        objective=CausalLM(),
        stages=(StageConfig(steps=2, sequence_length=8, batch_size=2, schedule=Constant(peak=1e-3)),),
        execution=ExecutionConfig(mesh=MeshConfig(fsdp=2, data=1), compute=ComputeConfig(unroll_layers=False)),
    )
    program = make_program(config, make_mesh(config.execution.mesh, jax.devices()[:2]))
    lowered = lower_train_step(program, config.stages[0])
    return program, lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


def test_the_state_is_given_away_and_comes_back_in_its_place(donated) -> None:
    program, step = donated
    state = program.init()
    abstract = program.abstract_batch(program.config.stages[0])
    batch = {n: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding) for n, leaf in abstract.items()}
    new, _ = step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batch))
    for mine, abstract in zip(jax.tree.leaves(new), jax.tree.leaves(program.abstract_state), strict=True):
        assert (mine.shape, mine.dtype, mine.sharding) == (abstract.shape, abstract.dtype, abstract.sharding)


def test_no_second_copy_of_the_state_is_allocated(donated) -> None:
    program, step = donated
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract_state))
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes >= size / 2 * 0.9, "each of two devices gets back its half of what it gave"
