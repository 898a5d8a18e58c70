"""tokamax's attention against the reference where it is installed, and one line where it is not."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn.attention import PREFERRED, AttentionCase, PathChoice, choose_path, dot_product_attention
from bertgpt_jax.nn.masks import AttentionMask, causal_mask, segment_mask
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.parallel.sharding import mesh_context

B, T, N, H = 8, 32, 2, 16
LENGTHS = np.array([32, 20, 1, 0, 32, 7, 9, 31])
REAL = np.arange(T) < LENGTHS[:, None]
MASKS = {
    "full": AttentionMask(),
    "causal": causal_mask(),
    "lengths": segment_mask(jnp.asarray(REAL, jnp.int32), packed=False),
}
TOKAMAX = PathChoice("tokamax")


def test_without_it_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        choose_path(TOKAMAX, AttentionCase((B, T, N, H), T, jnp.dtype("float32"), causal_mask()))
    assert "\n" not in str(caught.value)
    assert "it is not installed: pip install 'bertgpt_jax[tokamax]'" in str(caught.value)


def test_it_is_never_chosen() -> None:
    assert "tokamax" not in PREFERRED.values()


def test_what_it_cannot_serve() -> None:
    mask = AttentionMask(causal=True, window=4, q_segments_BT=REAL, kv_segments_BS=REAL)
    with pytest.raises(ConfigError) as caught:
        choose_path(TOKAMAX, AttentionCase((B, T, N, H), 2 * T, jnp.dtype("float32"), mask, True, 2))
    words = ["the mesh splits", "no dropout", "a window", "several segments", f"causal attention of {T} queries"]
    assert all(word in str(caught.value) for word in words), caught.value


class TestInstalled:
    pytestmark = pytest.mark.skipif(
        importlib.util.find_spec("tokamax") is None,
        reason="tokamax is not installed: pip install 'bertgpt_jax[tokamax]' (Python 3.12 or later)",
    )

    @pytest.mark.parametrize("split", [False, True], ids=["one device", "a mesh"])
    @pytest.mark.parametrize("name", MASKS)
    def test_equals_the_reference(self, name: str, split: bool) -> None:
        """Forward and gradients at real tokens."""
        rng = np.random.default_rng(0)
        *qkv, cotangent = (jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.float32) for _ in range(4))
        if name == "lengths":
            cotangent = cotangent * REAL[:, :, None, None]

        def run(choice: PathChoice) -> list[jax.Array]:
            out, pull = jax.vjp(lambda *x: dot_product_attention(*x, MASKS[name], choice=choice), *qkv)
            return [out * (REAL[:, :, None, None] if name == "lengths" else 1), *pull(cotangent)]

        expected = run(PathChoice())
        if split:
            with mesh_context(make_mesh(MeshConfig(data=4, tensor=2))):
                found = jax.jit(lambda: run(TOKAMAX))()
        else:
            found = run(TOKAMAX)
        for got, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
