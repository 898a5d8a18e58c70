"""Learning-rate schedules at their edges."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from bertgpt_jax.training.schedules import (
    BertLinear,
    Constant,
    Cosine,
    InverseSquareRoot,
    Linear,
    OneMinusSqrt,
    Schedule,
    WarmupStableDecay,
)

SHARED = dict(peak=2.0, warmup_steps=4)
HORIZON = SHARED | dict(total_steps=20, final_fraction=0.1)
# kind -> (schedule, rates at steps 0, 3, 4, 12, 20, 1000), by hand; the first four steps are the warmup
TABLE = {
    "linear": (Linear(**HORIZON), [0.5, 2.0, 2.0, 1.1, 0.2, 0.2]),
    "cosine": (Cosine(**HORIZON), [0.5, 2.0, 2.0, 1.1, 0.2, 0.2]),
    "one_minus_sqrt": (OneMinusSqrt(**HORIZON), [0.5, 2.0, 2.0, 0.2 + 1.8 * (1 - 0.5**0.5), 0.2, 0.2]),
    "wsd": (WarmupStableDecay(**HORIZON, decay_steps=16), [0.5, 2.0, 2.0, 1.1, 0.2, 0.2]),
    "wsd, late": (WarmupStableDecay(**HORIZON, decay_steps=4), [0.5, 2.0, 2.0, 2.0, 0.2, 0.2]),
    "wsd, no decay": (WarmupStableDecay(**HORIZON), [0.5, 2.0, 2.0, 2.0, 2.0, 0.2]),
    "wsd, sqrt": (
        WarmupStableDecay(**HORIZON, decay_steps=16, decay="one_minus_sqrt"),
        [0.5, 2.0, 2.0, 0.2 + 1.8 * (1 - 0.5**0.5), 0.2, 0.2],
    ),
    "constant": (Constant(**SHARED), [0.5, 2.0, 2.0, 2.0, 2.0, 2.0]),
    "rsqrt": (
        InverseSquareRoot(**SHARED),
        [0.5, 2.0, 2 * (4 / 5) ** 0.5, 2 * (4 / 13) ** 0.5, 2 * (4 / 21) ** 0.5, None],
    ),
    "bert_linear": (BertLinear(**HORIZON), [0.0, 1.5, 0.2 + 1.8 * 0.8, 0.2 + 1.8 * 0.4, 0.2, 0.2]),
}


@pytest.mark.parametrize("name", TABLE)
def test_rates_at_the_edges(name: str) -> None:
    schedule, expected = TABLE[name]
    for step, rate in zip((0, 3, 4, 12, 20, 1000), expected, strict=True):
        if rate is not None:
            np.testing.assert_allclose(schedule(jnp.asarray(step)), rate, rtol=1e-6, err_msg=f"step {step}")


@pytest.mark.parametrize("name", TABLE)
def test_offset_and_dtype(name: str) -> None:
    schedule = TABLE[name][0]
    later = schedule.model_copy(update={"offset": 5})
    steps = jnp.arange(25)
    rates = jax.vmap(schedule)(steps + 5)
    assert rates.dtype == jnp.float32 and np.all(np.isfinite(rates)) and np.all(rates >= 0)
    np.testing.assert_allclose(jax.jit(jax.vmap(later))(steps), rates, rtol=1e-6)


@pytest.mark.parametrize("name", TABLE)
def test_json_round_trip(name: str) -> None:
    adapter = TypeAdapter(Schedule)
    schedule = TABLE[name][0]
    assert adapter.validate_json(adapter.dump_json(schedule)) == schedule


def test_berts_discontinuity() -> None:
    """google-research/bert optimization.py: the decay is counted from step 0, so the rate falls 1% after warmup."""
    schedule = BertLinear(peak=1e-4, warmup_steps=10_000, total_steps=1_000_000)
    rates = [float(schedule(jnp.asarray(step))) for step in (0, 9_999, 10_000, 500_000, 1_000_000)]
    np.testing.assert_allclose(rates, [0.0, 9.999e-5, 9.9e-5, 5e-5, 0.0], rtol=1e-6, atol=1e-12)
    linear = Linear(peak=1e-4, warmup_steps=10_000, total_steps=1_000_000)
    np.testing.assert_allclose(linear(jnp.asarray(10_000)), 1e-4, rtol=1e-6)


def test_power_of_nvidias_lamb_schedule() -> None:
    """DeepLearningExamples PyTorch BERT: polynomial decay of degree 0.5."""
    schedule = BertLinear(peak=6e-3, warmup_steps=2000, total_steps=7038, power=0.5)
    np.testing.assert_allclose(schedule(jnp.asarray(3519)), 6e-3 * 0.5**0.5, rtol=1e-6)
    np.testing.assert_allclose(schedule(jnp.asarray(1000)), 3e-3, rtol=1e-6)


@pytest.mark.parametrize("kind", [Linear, Cosine, OneMinusSqrt, BertLinear, WarmupStableDecay])
def test_no_warmup_starts_at_the_peak(kind) -> None:
    np.testing.assert_allclose(kind(peak=3.0, total_steps=10)(jnp.asarray(0)), 3.0, rtol=1e-6)


def test_rsqrt_is_continuous_at_the_end_of_warmup_and_without_one() -> None:
    schedule = InverseSquareRoot(peak=1.0, warmup_steps=4000)
    before, after = (float(schedule(jnp.asarray(step))) for step in (3999, 4000))
    assert before == pytest.approx(1.0) and 0.9998 < after < 1.0
    np.testing.assert_allclose(InverseSquareRoot(peak=1.0)(jnp.asarray(3)), 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="linear", warmup_steps=10, total_steps=10), "warmup_steps 10 must be below total_steps 10"),
        (dict(kind="wsd", warmup_steps=5, total_steps=10, decay_steps=6), "decay_steps 6"),
        (dict(kind="linear", peak=-1.0), "greater than 0"),
        (dict(kind="cosine", final_fraction=1.5), "less than or equal to 1"),
    ],
)
def test_contradictions_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Schedule).validate_python(fields)
