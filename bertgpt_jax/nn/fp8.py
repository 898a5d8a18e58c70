"""Matrix products whose operands are rounded to 8-bit floats, each tensor with one scale of its own.

Formats as in Micikevicius et al. 2022 (arXiv 2209.05433): e4m3 forward, e5m2 for gradients. A scale comes from the
largest magnitude of the very tensor it belongs to, so that nothing is kept from step to step; of all its parts, where
a mesh splits it, but where every replica adds up gradients of its own (`parallel.replicas`) of the replica's.

A scale is a power of two: rounding to 8 bits is then the only rounding, and the operands of a product are the same
numbers whether XLA calls cuBLASLt's 8-bit kernel (its GemmRewriter does where it finds 8 bits -> convert -> times a
scalar -> dot; openxla/xla `gemm_rewriter.cc`) or multiplies them in the wide type, as on a CPU.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from bertgpt_jax.shapes import Array

FORWARD = jnp.float8_e4m3fn
BACKWARD = jnp.float8_e5m2

Contracted = tuple[tuple[int, ...], tuple[int, ...]]
"""The dimensions of (x, kernel) that a product sums over."""


def dot_general(x: Array, kernel: Array, contracted: Contracted) -> Array:
    """The product of 8-bit x and 8-bit kernel, in x's dtype; x's other dimensions come first, then the kernel's.

    So are its gradients products of 8-bit operands: of what was multiplied, and of the incoming gradient. Where an
    operand is not finite, neither is the product.
    """
    return _product(x, kernel, contracted, kernel.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, kernel: Array, contracted: Contracted, kernel_dtype: jnp.dtype) -> Array:
    return _forward(x, kernel, contracted, kernel_dtype)[0]


def _forward(x: Array, kernel: Array, contracted: Contracted, kernel_dtype: jnp.dtype) -> tuple[Array, tuple]:
    # The backward pass finds its operands in 8 bits even where a scan hands them on through memory.
    saved = quantize(x, FORWARD), quantize(kernel, FORWARD)
    return _wide_product(contracted, *_dequantized(x.dtype, *saved)), saved


def _backward(contracted: Contracted, kernel_dtype: jnp.dtype, saved: tuple, dy: Array) -> tuple[Array, Array]:
    x, kernel, dy = _dequantized(dy.dtype, *saved, quantize(dy, BACKWARD))
    dx, dkernel = jax.vjp(partial(_wide_product, contracted), x, kernel)[1](dy)
    return dx, dkernel.astype(kernel_dtype)


_product.defvjp(_forward, _backward)


def _dequantized(dtype: jnp.dtype, *operands: tuple[Array, Array]) -> list[Array]:
    # Apart from other products of the same x: XLA would join them into one, of operands with different scales, and
    # then finds no 8-bit kernel for it.
    return [dequantize(*operand, dtype) for operand in jax.lax.optimization_barrier(operands)]


def _wide_product(contracted: Contracted, x: Array, kernel: Array) -> Array:
    return jax.lax.dot_general(x, kernel, (contracted, ((), ())))


def quantize(x: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """(x / scale in an 8-bit dtype, scale fp32 []); the scale is the least power of two that keeps x in range.

    Values of x that are far below its largest become subnormal or 0. If one is not finite, all of the result is NaN:
    conversions to 8 bits may otherwise make the largest number of infinity.
    """
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    mantissa, power = jnp.frexp(largest)
    most_mantissa, most_power = math.frexp(float(jnp.finfo(dtype).max))
    power = power - most_power + (mantissa > most_mantissa)
    power = jnp.clip(power, -126, 126)  # normal fp32 and bf16 numbers, the inverse too
    inverse = jnp.where(jnp.isfinite(largest), _two_to(-power), jnp.nan)
    return (x * inverse.astype(x.dtype)).astype(dtype), _two_to(power)


def dequantize(q: Array, scale: Array, dtype: jnp.dtype) -> Array:
    """q * scale, exactly."""
    return q.astype(dtype) * scale.astype(dtype)


def _two_to(power: Array) -> Array:
    """2^power for int32 in -126..126; exp2 may be off by a rounding."""
    return jax.lax.bitcast_convert_type((power + 127) << 23, jnp.float32)
