"""What draws dropout masks: each generator its own, the default as ever, part of a run's identity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.config import identity
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.base import Sums
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.parallel.sharding import place_batch
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant
from bertgpt_jax.training.setup import lower_train_step, make_program
from bertgpt_jax.training.step import PRNGS, init_state, train_step


def config_of(prng: str, data: int = 1, microbatches: int = 1, **mesh) -> RunConfig:
    sizes = dict(num_layers=1, hidden_size=8, num_heads=2, intermediate_size=16, hidden_dropout=0.5)
    return RunConfig(
        corpus=CorpusConfig(path="unused"),
        model=GptConfig(vocab_size=16, max_positions=8, **sizes),
        objective=CausalLM(),
        stages=(
            StageConfig(
                steps=2, sequence_length=8, batch_size=8, microbatches=microbatches, schedule=Constant(peak=1e-3)
            ),
        ),
        dropout_prng=prng,
        execution=ExecutionConfig(mesh=MeshConfig(data=data, **mesh), compute=ComputeConfig(unroll_layers=False)),
    )


def loss(prng: str, data: int = 1, microbatches: int = 1) -> float:
    """Of the first step; all rows of the batch are alike, so only dropout tells them apart."""
    config = config_of(prng, data, microbatches)
    program = make_program(config, make_mesh(config.execution.mesh, jax.devices()[:data]))
    step = lower_train_step(program, config.stages[0]).compile(compiler_options={"xla_backend_optimization_level": 0})
    ids = np.tile(np.arange(8, dtype=np.int32), (8, 1))
    batch = {"tokens": ids, "positions": ids, "targets": ids, "weights": np.ones((8, 8), np.float32)}
    return float(step(program.init(), place_batch(batch, program.mesh, 8))[1]["loss"])


def drawn(prng: str) -> float:
    """What one step draws with: the loss of a model that is nothing but its key."""

    class Noise:
        def coefficients(self):
            return {"noise": 1.0}

        def metric_parts(self):
            return {}

        def weights(self, batch):
            return {"noise": jnp.float32(1)}

        def loss(self, model, params, batch, carry, key):
            return Sums({"noise": params["kernel"] * jax.random.uniform(key)}, {}, carry)

    optimizer = AdamW()
    state = init_state({"kernel": jnp.float32(1)}, optimizer.build())
    return float(
        train_step(
            state, {}, model=None, objective=Noise(), optimizer=optimizer, schedule=Constant(peak=1e-3), microbatches=1,
            seed=0, prng=prng,
        )[1]["loss"]
    )  # fmt: skip


def test_generators_draw_differently() -> None:
    draws = {prng: drawn(prng) for prng in PRNGS}
    assert len(set(draws.values())) == 3
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)
    assert draws["threefry"] == float(jax.random.uniform(key)), "the default draws what it always drew"


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2])
def test_another_mesh_drops_the_same(microbatches: int) -> None:
    one, two = (loss("threefry", data, microbatches) for data in (1, 2))
    assert two == pytest.approx(one, rel=1e-6)


def test_philox_is_for_one_device() -> None:
    config = config_of("philox", data=2)
    with pytest.raises(ConfigError, match="dropout_prng = 'philox' on 2 devices.*use threefry, or rbg"):
        make_program(config, make_mesh(config.execution.mesh, jax.devices()[:2]))


def test_it_is_part_of_the_identity() -> None:
    assert "dropout_prng" not in identity(config_of("threefry"))
    assert identity(config_of("rbg"))["dropout_prng"] == "rbg"


def test_a_typo_is_an_error() -> None:
    with pytest.raises(ValueError, match="dropout_prng"):
        config_of("threfry")
