"""Products of 8-bit operands on meshes: one scale for a tensor in parts, or one a replica that adds up its own."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bertgpt_jax.parallel import sharding
from bertgpt_jax.parallel.mesh import make_mesh
from bertgpt_jax.training.setup import lower_train_step, make_program

pytestmark = pytest.mark.slow

STEPS = 4


def losses(runs, shape: tuple[int, int, int], microbatches: int, **compute) -> np.ndarray:
    config = runs.run_config("gpt", shape, microbatches=microbatches, **compute)
    mesh = make_mesh(config.execution.mesh, jax.devices()[: int(np.prod(shape))])
    program = make_program(config, mesh)
    step, state, found = lower_train_step(program, config.stages[0]).compile(), program.init(), []
    for number in range(STEPS):
        state, metrics = step(state, sharding.place_batch(runs.batch_of(config, number), mesh, runs.ROWS))
        found.append([metrics["loss"], metrics["grad_norm"]])
    return np.array(jax.device_get(found), np.float64)


def fp8(runs, shape: tuple[int, int, int], microbatches: int = 1) -> np.ndarray:
    return losses(runs, shape, microbatches, matmul="fp8", emulate=True)


@pytest.fixture(scope="module")
def one(runs) -> np.ndarray:
    return fp8(runs, (1, 1, 1))


@pytest.fixture(scope="module")
def rounding(runs, one: np.ndarray) -> np.ndarray:
    """What rounding to 8 bits does to losses and gradient norms."""
    return np.abs(losses(runs, (1, 1, 1), 1) / one - 1).max(0)


@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((1, 8, 1), marks=pytest.mark.long)], ids=["2,2,2", "1,8,1"])
def test_a_tensor_in_parts_has_one_scale(runs, one, rounding, shape: tuple[int, int, int]) -> None:
    """A few operands on the border between two 8-bit numbers fall otherwise when sums are taken in another order."""
    apart = np.abs(fp8(runs, shape) / one - 1).max(0)
    assert (apart < 0.2 * rounding).all(), (apart, rounding)


@pytest.mark.long
def test_replicas_with_gradients_of_their_own_have_scales_of_their_own(runs, rounding) -> None:
    apart = np.abs(fp8(runs, (2, 2, 2), microbatches=2) / fp8(runs, (1, 1, 1), microbatches=2) - 1).max(0)
    assert (apart < 2 * rounding).all(), (apart, rounding)
