"""The rungs of `gpu_ablation`: techniques one by one, what was predicted of them, how each is taken out of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bertgpt_jax.nn import blocks, layers
from bertgpt_jax.shapes import Array, Hidden


class Rung(NamedTuple):
    """One technique more than the rung before.

    Attributes:
        predicted: milliseconds of a step on one H200; None where nothing was predicted.
        compute: settings of `execution.compute`.
        naive_loss: by `log_softmax` and a gather; plain_norm: differentiated by jax; fused: q, k and v as one product
            that is then split; everywhere: BERT's head at all positions.
    """

    name: str
    predicted: float | None
    compute: dict[str, Any]
    naive_loss: bool = False
    plain_norm: bool = False
    fused: bool = False
    everywhere: bool = False


KERNEL, GELU = {"attention": "auto"}, {"attention": "auto", "remat": "gelu"}
LADDERS: dict[str, tuple[Rung, ...]] = {
    "gpt2": (
        Rung("nothing", 199, {"attention": "reference"}, naive_loss=True, plain_norm=True, fused=True),
        Rung("fused attention", 147, KERNEL, naive_loss=True, plain_norm=True, fused=True),
        Rung("own cross-entropy", 130, KERNEL, plain_norm=True, fused=True),
        Rung("own layer norm", 126.5, KERNEL, fused=True),
        Rung("q, k, v as three products", 123.2, KERNEL),
        Rung("GELU recomputed", 118, GELU),
        Rung("loss in chunks", 119, GELU | {"head_chunk": 128}),
        Rung("layers recomputed", 150, KERNEL | {"head_chunk": 128, "remat": "full"}),
    ),
    "bert_base": (
        Rung("head everywhere", 114, KERNEL, naive_loss=True, plain_norm=True, fused=True, everywhere=True),
        Rung("masked positions alone", 89, KERNEL, naive_loss=True, plain_norm=True, fused=True),
        Rung("own loss, norms, products, GELU", 82, GELU),
    ),
}
"""GPT-2 124M at 1,024 tokens, 64 rows; BERT-base at 128, 512 rows. Predictions are read off programs compiled for an
H200 without one: 650 TFLOP/s in matrix products, 85% of 4.3 TB/s elsewhere. That of the last rung of the GPT is what
recomputing costs the 1.5B model, 27%."""


# ---------------------------------------------------------------- what is taken out


@contextlib.contextmanager
def without(rung: Rung) -> Iterator[None]:
    """What is traced meanwhile has the plain layer norm and fused projections that the rung asks for."""
    replaced = []
    if rung.plain_norm:
        replaced.append((layers, "layer_norm", plain_layer_norm))
    if rung.fused:
        replaced.append((blocks, "Attention", FusedAttention))
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def plain_layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """`layers.layer_norm` with the gradient that jax finds."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, -1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32 - mean), -1, keepdims=True) + eps)
    return ((x32 - mean) * inverse * scale + bias).astype(x.dtype)


class FusedAttention(blocks.Attention):
    """`Attention` whose queries, keys and values are one product, split afterwards; its parameters are the same."""

    def setup(self) -> None:
        c = self.config
        shape, axes = (c.hidden_size, c.num_heads, c.head_size), ("embed", "heads", "head_dim")
        self.query, self.key, self.value = (
            layers.Einsum("BTD,DNH->BTNH", shape, axes, c.weight_init()) for _ in range(3)
        )
        shape, axes = (c.num_heads, c.head_size, c.hidden_size), ("heads", "head_dim", "embed")
        self.output = layers.Einsum("BTNH,NHD->BTD", shape, axes, c.weight_init(residual=True))

    def __call__(self, x_BTD: Hidden, mask: Any, cache: None = None, slot: None = None) -> tuple[Hidden, None]:
        parts = (self.query, self.key, self.value)
        if self.is_initializing():
            q_BTNH, k_BTNH, v_BTNH = (part(x_BTD) for part in parts)
        else:
            kernel, bias = (
                jnp.concatenate([part.variables["params"][name] for part in parts], -2).astype(x_BTD.dtype)
                for name in ("kernel", "bias")
            )
            all_BTMH = jax.lax.dot_general(x_BTD, kernel, (((2,), (0,)), ((), ()))) + bias
            q_BTNH, k_BTNH, v_BTNH = jnp.split(all_BTMH, 3, axis=2)
        o_BTNH = blocks.dot_product_attention(q_BTNH, k_BTNH, v_BTNH, mask, choice=self.choice)
        return self.output(o_BTNH), cache
