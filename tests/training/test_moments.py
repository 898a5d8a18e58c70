"""Adam's moments in less memory: what is kept, that rounding is right on average, that training stays close."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bertgpt_jax.config import identity
from bertgpt_jax.training.moments import matrix_sides, round_at_random
from bertgpt_jax.training.optim import AdamW, BertAdam, Lamb
from bertgpt_jax.training.run_config import StageConfig


def params() -> dict:
    key = iter(jax.random.split(jax.random.key(0), 8))
    shapes = {
        "layers": {"up": {"kernel": (2, 8, 16), "bias": (2, 16)}, "output": {"kernel": (2, 2, 4, 8)}},
        "table": (32, 8),
    }
    return jax.tree.map(lambda s: jax.random.normal(next(key), s), shapes, is_leaf=lambda s: isinstance(s, tuple))


def after(optimizer, steps: int = 20) -> tuple[dict, dict]:
    """(parameters, state) of a least-squares problem after some updates."""
    start, target = params(), jax.tree.map(lambda p: 0.5 * p, params())
    transformation = optimizer.build()

    @jax.jit
    def step(p, state):
        grads = jax.tree.map(lambda a, b: a - b, p, target)
        updates, state = transformation.update(grads, state, p)
        return jax.tree.map(lambda a, u: a + 0.01 * u, p, updates), state

    p, state = start, transformation.init(start)
    for _ in range(steps):
        p, state = step(p, state)
    return p, state


@pytest.mark.parametrize("kind", [AdamW, BertAdam, Lamb])
def test_small_moments_train_nearly_the_same(kind) -> None:
    exact, _ = after(kind())
    for settings in ({"first_moment": "bfloat16"}, {"second_moment": "bfloat16"}, {"second_moment": "factored"}):
        found, _ = after(kind(**settings))
        moved = optax.tree.norm(jax.tree.map(jnp.subtract, exact, params()))
        apart = optax.tree.norm(jax.tree.map(jnp.subtract, exact, found))
        assert 0 < float(apart / moved) < (0.6 if "factored" in settings.values() else 0.02), settings


def test_what_is_kept() -> None:
    _, state = after(AdamW(first_moment="bfloat16", second_moment="bfloat16"), 1)
    assert {x.dtype for x in jax.tree.leaves((state[0]["mu"], state[0]["nu"]))} == {jnp.dtype("bfloat16")}
    _, state = after(AdamW(second_moment="factored"), 1)
    nu = state[0]["nu"]
    assert jax.tree.map(jnp.shape, nu["layers"]["up"]["kernel"]) == {"rows": (2, 8), "columns": (2, 16)}
    assert jax.tree.map(jnp.shape, nu["layers"]["output"]["kernel"]) == {"rows": (2, 2, 4), "columns": (2, 8)}
    assert nu["layers"]["up"]["bias"].shape == (2, 16) and nu["table"]["rows"].shape == (32,)


def test_the_first_factored_update_by_hand() -> None:
    """v = row means x column means / mean: of g = outer(a, b) exactly g^2, and Adam's first step is then sign(g)."""
    optimizer = AdamW(second_moment="factored", weight_decay=0.0)
    p = {"table": jnp.zeros((3, 4))}
    g = {"table": jnp.outer(jnp.array([1.0, -2.0, 3.0]), jnp.array([1.0, 2.0, -1.0, 0.5]))}
    updates, _ = optimizer.build().update(g, optimizer.build().init(p), p)
    np.testing.assert_allclose(updates["table"], -jnp.sign(g["table"]), rtol=1e-5)


def test_defaults_keep_optax_state_and_identity() -> None:
    """Checkpoints from before stay readable: the same paths, the same identity."""
    mine, theirs = AdamW().build().init(params()), optax.adamw(1.0, mask=AdamW().decay_mask).init(params())
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    assert "first_moment" not in identity(AdamW()) and identity(AdamW(second_moment="bfloat16"))["second_moment"]


def test_rounding_is_one_neighbour_and_right_on_average() -> None:
    x = jnp.full(200_000, 1.0 + 0.3 * 2**-7)
    found = round_at_random(x, jax.random.key(1)).astype(jnp.float32)
    assert set(np.unique(found)) == {1.0, 1.0 + 2**-7}
    assert abs(float(jnp.mean(found)) - float(x[0])) < 0.02 * 2**-7
    again = round_at_random(x, jax.random.key(1)).astype(jnp.float32)
    np.testing.assert_array_equal(found, again)


def test_a_slow_mean_moves_although_every_step_is_below_the_rounding() -> None:
    """v from 1 towards 0.5 with b2 = 0.999: rounding to nearest would stay at 1 for ever."""

    def step(state, n):
        random, nearest = state
        new = [0.999 * v.astype(jnp.float32) + 0.001 * 0.5 for v in state]
        return (round_at_random(new[0], jax.random.key(n)), new[1].astype(jnp.bfloat16)), None

    start = jnp.ones(512, jnp.bfloat16)
    (random, nearest), _ = jax.lax.scan(step, (start, start), jnp.arange(1000))
    expected = 0.5 + 0.5 * 0.999**1000
    assert abs(float(jnp.mean(random.astype(jnp.float32))) - expected) < 0.01
    assert float(nearest[0]) == 1.0


@pytest.mark.parametrize(
    ("name", "dimensions", "sides"),
    [
        ("layers/attention/query/kernel", 4, ((1,), (2, 3))),
        ("layers/attention/output/kernel", 4, ((1, 2), (3,))),
        ("layers/feed_forward/up/kernel", 3, ((1,), (2,))),
        ("layers/attention/query/bias", 3, None),
        ("layers/attention_norm/scale", 2, None),
        ("token_embedding/table", 2, ((0,), (1,))),
        ("masked_bias", 1, None),
    ],
)
def test_matrices(name: str, dimensions: int, sides) -> None:
    assert matrix_sides(name, dimensions) == sides


def test_moments_of_another_kind_cannot_be_taken_over() -> None:
    from bertgpt_jax.training.run_config import _stage_problems

    class Run:
        class model:
            max_positions = 64

        class objective:
            kind = "causal_lm"

        stages = tuple(
            StageConfig(name=name, steps=1, sequence_length=8, batch_size=1, optimizer=optimizer)
            for name, optimizer in (("a", AdamW()), ("b", AdamW(second_moment="bfloat16")))
        )

    (problem,) = _stage_problems(Run)
    assert "adamw (float32, bfloat16)" in problem and "reset_optimizer" in problem
