"""AdamW against torch.optim.AdamW."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.training.optim import AdamW

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[parity]'")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_ten_steps(decay: float) -> None:
    rng, rate = np.random.default_rng(0), 1e-2
    start = {"kernel": rng.standard_normal((5, 7)), "bias": rng.standard_normal(7)}
    start = {name: array.astype(np.float32) for name, array in start.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in start.items()}
    optimizer = torch.optim.AdamW(
        [{"params": [theirs["kernel"]], "weight_decay": decay}, {"params": [theirs["bias"]], "weight_decay": 0.0}],
        lr=rate, betas=(0.9, 0.98), eps=1e-8,
    )  # fmt: skip
    transformation = AdamW(b2=0.98, weight_decay=decay).build()
    params = jax.tree.map(jnp.asarray, start)
    state, update = transformation.init(params), jax.jit(transformation.update)
    for _ in range(10):
        grads = {name: rng.standard_normal(array.shape).astype(np.float32) for name, array in start.items()}
        for name, grad in grads.items():
            theirs[name].grad = torch.tensor(grad)
        optimizer.step()
        updates, state = update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    for name, array in params.items():
        np.testing.assert_allclose(array, theirs[name].detach().numpy(), atol=1e-6, err_msg=name)
