"""Adam's moments in less memory: bf16 for either, or a second moment of row and column means instead of every entry."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from bertgpt_jax.parallel.sharding import path_name
from bertgpt_jax.shapes import Array, Params, PyTree

STACKED = "layers/"
"""Parameters under this path carry the layer on their first axis."""

First = Literal["float32", "bfloat16"]
Second = Literal["float32", "bfloat16", "factored"]


def scale_by_small_adam(
    b1: float, b2: float, eps: float, first: First, second: Second, corrected: bool
) -> optax.GradientTransformation:
    """m / (sqrt(v) + eps), computed in fp32 from moments kept as `first` and `second` say.

    bf16 keeps eight bits: with b2 = 0.999 rounding to nearest would undo every change of v below one part in 500, so v
    is rounded up or down at random, right on average; the same bits on every mesh.

    Args:
        corrected: divide by 1 - b^t (Kingma & Ba 2015, algorithm 1).
    """

    def init(params: Params) -> dict[str, Any]:
        mu = jax.tree.map(lambda p: jnp.zeros(p.shape, first), params)
        return {"count": jnp.zeros((), jnp.int32), "mu": mu, "nu": jax.tree_util.tree_map_with_path(zeros, params)}

    def zeros(path: tuple, p: Array) -> PyTree:
        sides = matrix_sides(path_name(path), p.ndim) if second == "factored" else None
        if sides is None:
            return jnp.zeros(p.shape, jnp.float32 if second == "factored" else second)
        return {"rows": jnp.mean(jnp.zeros_like(p), sides[1]), "columns": jnp.mean(jnp.zeros_like(p), sides[0])}

    def update(grads: Params, state: dict[str, Any], params: Params | None = None) -> tuple[Params, dict[str, Any]]:
        count = state["count"] + 1
        mu = jax.tree.map(lambda m, g: b1 * m.astype(jnp.float32) + (1 - b1) * g, state["mu"], grads)
        paths, nu, full, kept = [], jax.tree.structure(grads).flatten_up_to(state["nu"]), [], []
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(grads)]
        for number, (path, g, v) in enumerate(zip(paths, jax.tree.leaves(grads), nu, strict=True)):
            key = jax.random.fold_in(jax.random.key(number), count)
            v, stored = _second(v, g, b2, matrix_sides(path, g.ndim), key)
            full.append(v)
            kept.append(stored)
        m_scale, v_scale = (1 / (1 - b**count) if corrected else 1.0 for b in (b1, b2))
        whole = jax.tree.structure(grads).unflatten(full)
        updates = jax.tree.map(lambda m, v: m * m_scale / (jnp.sqrt(v * v_scale) + eps), mu, whole)
        mu = jax.tree.map(lambda m: m.astype(first), mu)
        return updates, {"count": count, "mu": mu, "nu": jax.tree.structure(grads).unflatten(kept)}

    return optax.GradientTransformation(init, update)


def _second(v: PyTree, g: Array, b2: float, sides: tuple | None, key: Array) -> tuple[Array, PyTree]:
    """(the second moment of every entry, what is kept of it) after one more gradient."""
    square = jnp.square(g)
    if not isinstance(v, dict):
        new = b2 * v.astype(jnp.float32) + (1 - b2) * square
        return new, new if v.dtype == jnp.float32 else round_at_random(new, key)
    inputs, outputs = sides
    rows = b2 * v["rows"] + (1 - b2) * jnp.mean(square, outputs)
    columns = b2 * v["columns"] + (1 - b2) * jnp.mean(square, inputs)
    rows_1, columns_1 = jnp.expand_dims(rows, outputs), jnp.expand_dims(columns, inputs)
    mean = jnp.maximum(jnp.mean(rows_1, inputs, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return rows_1 / mean * columns_1, {"rows": rows, "columns": columns}


def round_at_random(x: Array, key: Array) -> Array:
    """fp32 x as bf16: one of the two neighbours, the nearer more often, so that the mean is x."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def matrix_sides(name: str, dimensions: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(input, output) axes of a parameter that is a matrix, or one a layer; None for vectors.

    Attention kernels are D x (N H) and (N H) x D matrices.
    """
    if not name.startswith(STACKED):
        return ((0,), (1,)) if dimensions == 2 else None
    if not name.endswith("/kernel"):
        return None
    inputs = dimensions - 2 if name.split("/")[-2] == "output" else 1
    return tuple(range(1, 1 + inputs)), tuple(range(1 + inputs, dimensions))
