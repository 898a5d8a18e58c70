"""Parameterised primitives: one einsum, one embedding table, two norms; and the pure functions around them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bertgpt_jax.nn import fp8
from bertgpt_jax.nn.random import bernoulli
from bertgpt_jax.shapes import Array

Initializer = Callable[..., Array]

Matmul = Literal["same", "fp8"]
"""The operands of a linear map's product: in its input's dtype, or rounded to 8 bits (`nn.fp8`)."""


def constrain(x: Array, *axes: str | None) -> Array:
    """Names the logical axes of an activation; `parallel` decides what that means on a mesh (nothing without one)."""
    return nn.with_logical_constraint(x, axes)


class Einsum(nn.Module):
    """`einsum(equation, x, kernel) + bias`, with the kernel's true shape, logical axes and init in one place.

    Flax's Dense flattens multi-dimensional kernels at init, which breaks logical partitioning (flax issue 3676).

    Attributes:
        equation: e.g. `BTD,DNH->BTNH`; the second operand is the kernel. The result has x's own letters, then the
            kernel's.
        shape: of the kernel.
        axes: logical name of each kernel dimension.
        kernel_init: kernel initializer (a field called `init` would hide `Module.init`).
        use_bias: adds a zero-initialised bias over the kernel's dimensions that reach the output.
        before: applied to x first.
        matmul: how the product is computed.
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    kernel_init: Initializer
    use_bias: bool = True
    before: Callable[[Array], Array] | None = None
    matmul: Matmul = "same"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x if self.before is None else self.before(x)
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", init, self.shape, jnp.float32)
        letters = self.equation.replace("->", ",").split(",")
        # jnp.einsum contracts in alphabetical order: BTNH,NHD->BTD would transpose x and copy the kernel in every call.
        contracted = [letter for letter in letters[1] if letter not in letters[2]]
        ends = [[operand.index(letter) - len(operand) for letter in contracted] for operand in letters[:2]]
        dimensions = tuple(x.ndim + i for i in ends[0]), tuple(kernel.ndim + i for i in ends[1])
        if self.matmul == "fp8":
            y = fp8.dot_general(x, kernel, dimensions)
        else:
            y = jax.lax.dot_general(x, kernel.astype(x.dtype), (dimensions, ((), ())))
        if self.use_bias:
            kept = [i for i, letter in enumerate(letters[1]) if letter in letters[2]]
            shape, axes = tuple(self.shape[i] for i in kept), tuple(self.axes[i] for i in kept)
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, axes), shape, jnp.float32)
            y = y + bias.astype(x.dtype)
        # XLA 0.11 joins a gelu to an 8-bit product, and then cannot emit the two results that training needs of it.
        return jax.lax.optimization_barrier(y) if self.matmul == "fp8" else y


NEVER = -1e30
"""The logit of what is no word."""


def rounded_up(count: int, multiple: int) -> int:
    """The smallest multiple from `count` on."""
    return -(-count // multiple) * multiple


def first_rows(init: Initializer, count: int) -> Initializer:
    """`init` with zeros in the rows from `count` on; the rows before are those it draws without the others."""

    def some(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        rows = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return jnp.where(rows < count, init(key, shape, dtype), jnp.zeros((), dtype))

    return some


def hide_padding(logits: Array, words: int) -> Array:
    """Logits [..., V'] of which those from `words` on can never win and have no gradient."""
    if logits.shape[-1] == words:
        return logits
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(ids < words, logits, jnp.asarray(NEVER, logits.dtype))


class Embedding(nn.Module):
    """A table of vectors, looked up by id or used as the output projection of a tied head.

    Attributes:
        rows, width: shape of the table.
        axes: logical names of (rows, width).
        table_init: table initializer.
    """

    rows: int
    width: int
    axes: tuple[str, str]
    table_init: Initializer

    def setup(self) -> None:
        init = nn.with_logical_partitioning(self.table_init, self.axes)
        self.table = self.param("table", init, (self.rows, self.width), jnp.float32)

    def __call__(self, ids: Array, dtype: jnp.dtype) -> Array:
        """Rows `ids` [...] as [..., width]."""
        # Gathered whole before the lookup: a lookup in a table sharded both ways makes XLA rematerialise it.
        return constrain(self.table.astype(dtype), None, None)[ids]

    def attend(self, x: Array) -> Array:
        """Dot products of x [..., width] with every row: [..., rows]."""
        return jnp.einsum("...D,VD->...V", x, self.table.astype(x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """Layer normalisation over the last axis (Ba et al. 2016), statistics in fp32, result in x's dtype.

    Its own gradient keeps x and two fp32 numbers a row instead of autodiff's several fp32 copies of x.
    """
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(x: Array, scale: Array, bias: Array, eps: float) -> tuple[Array, tuple]:
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, -1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32 - mean), -1, keepdims=True) + eps)
    y = (x32 - mean) * inverse * scale + bias
    return y.astype(x.dtype), (x, scale, mean, inverse)


def _layer_norm_backward(eps: float, saved: tuple, dy: Array) -> tuple[Array, Array, Array]:
    x, scale, mean, inverse = saved
    dy32 = dy.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse
    dn, dscale, along = _pulled_scale(normal, scale, dy32)
    dx = inverse * (dn - jnp.mean(dn, -1, keepdims=True) - along)
    return dx.astype(x.dtype), dscale, jnp.sum(dy32, tuple(range(dy.ndim - 1)))


def _pulled_scale(normal: Array, scale: Array, dy: Array) -> tuple[Array, Array, Array]:
    """Gradients of normal x scale, and of the first what lies along `normal`, which a norm cannot change; fp32."""
    dn = dy * scale
    dscale = jnp.sum(dy * normal, tuple(range(dy.ndim - 1)))
    return dn, dscale, normal * jnp.mean(dn * normal, -1, keepdims=True)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x [..., D] over its root mean square along D, times scale [D] in fp32 (Zhang & Sennrich 2019, eq. 4).

    Statistics are fp32, the result has x's shape and dtype. Its own gradient keeps x and one fp32 number a row.
    """
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(x: Array, scale: Array, eps: float) -> tuple[Array, tuple]:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    return (x32 * inverse * scale).astype(x.dtype), (x, scale, inverse)


def _rms_norm_backward(eps: float, saved: tuple, dy: Array) -> tuple[Array, Array]:
    x, scale, inverse = saved
    dn, dscale, along = _pulled_scale(x.astype(jnp.float32) * inverse, scale, dy.astype(jnp.float32))
    return (inverse * (dn - along)).astype(x.dtype), dscale


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class LayerNorm(nn.Module):
    """`layer_norm` with its parameters: scale starts at 1, bias at 0."""

    width: int
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers
        scale = self.param("scale", nn.with_logical_partitioning(init.ones, ("norm",)), (self.width,), jnp.float32)
        bias = self.param("bias", nn.with_logical_partitioning(init.zeros, ("norm",)), (self.width,), jnp.float32)
        return layer_norm(x, scale, bias, self.eps)


class RMSNorm(nn.Module):
    """`rms_norm` with its parameter: scale starts at 1."""

    width: int
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        return rms_norm(x, self.param("scale", ones, (self.width,), jnp.float32), self.eps)


def dropout(x: Array, rate: float, key: Array | None, arrange: Callable[[Array], Array] | None = None) -> Array:
    """Zeroes each element with probability `rate` and scales the rest by 1/(1-rate); identity without a key.

    Args:
        arrange: what is kept, drawn as if x lay in its own order -> as x lies; the same elements are dropped on every
            mesh.
    """
    if key is None or rate == 0.0:
        return x
    keep = bernoulli(key, 1.0 - rate, x.shape)
    keep = keep if arrange is None else arrange(keep)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def dropout_key(module: nn.Module) -> Array | None:
    """A fresh key of the `dropout` stream, or None: a model drops exactly when it is applied with that stream."""
    return module.make_rng("dropout") if module.has_rng("dropout") else None


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: Array, approximate: bool) -> Array:
    """x Phi(x) (Hendrycks & Gimpel 2016), or its tanh approximation; saves x alone for the gradient."""
    return jax.nn.gelu(x, approximate=approximate)


def _gelu_forward(x: Array, approximate: bool) -> tuple[Array, Array]:
    return gelu(x, approximate), x


def _gelu_backward(approximate: bool, x: Array, dy: Array) -> tuple[Array]:
    return jax.vjp(partial(jax.nn.gelu, approximate=approximate), x)[1](dy)


gelu.defvjp(_gelu_forward, _gelu_backward)


def activation(name: str) -> Callable[[Array], Array]:
    """`gelu` (erf, Hendrycks & Gimpel 2016), `gelu_tanh` (its approximation: GPT-2, BERT since 2019-02) or `relu`."""
    table = {"gelu": partial(gelu, approximate=False), "gelu_tanh": partial(gelu, approximate=True)}
    return (table | {"relu": jax.nn.relu})[name]
