"""RMSNorm against torch.nn.functional.rms_norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.nn.layers import rms_norm

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[parity]'")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_value_and_gradients(offset: float) -> None:
    rng, width, eps = np.random.default_rng(0), 48, 1e-6
    x, dy = (rng.standard_normal((4, 7, width)).astype(np.float32) for _ in range(2))
    x, scale = x + np.float32(offset), rng.standard_normal(width).astype(np.float32)
    y, pull = jax.vjp(lambda x, scale: rms_norm(x, scale, eps), jnp.asarray(x), jnp.asarray(scale))
    theirs = [torch.tensor(array, requires_grad=True) for array in (x, scale)]
    expected = torch.nn.functional.rms_norm(theirs[0], (width,), theirs[1], eps)
    expected.backward(torch.tensor(dy))
    np.testing.assert_allclose(y, expected.detach().numpy(), atol=1e-5)
    for mine, tensor in zip(pull(jnp.asarray(dy)), theirs, strict=True):
        np.testing.assert_allclose(mine, tensor.grad.numpy(), rtol=1e-5, atol=2e-5)
