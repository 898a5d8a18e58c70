"""The vocabulary head and its cross-entropy as one function, in chunks: the logits of a batch never exist together.

The gradient of a weighted sum of cross-entropies is known as soon as the logits are, but for one factor that the
backward pass brings. So the forward pass computes it chunk by chunk and keeps it, and no product is done twice (Liger,
Hsu et al. 2024, section 3.2; a checkpointed loop over chunks computes the logits again).
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn import sequence
from bertgpt_jax.nn.layers import NEVER
from bertgpt_jax.shapes import Array, Hidden


class HeadLoss(NamedTuple):
    """Sums over all positions, weighted, fp32 [].

    Attributes:
        loss: of the cross-entropies (with label smoothing and z-loss, where asked for).
        right: of 1 where the label's logit is the largest (ties count); no gradient.
    """

    loss: Array
    right: Array


class _Settings(NamedTuple):
    chunk: int
    z_loss: float
    label_smoothing: float
    words: int
    rows: tuple[str, ...]
    vocab: tuple[str, ...]
    length: tuple[str, ...]


def linear_cross_entropy(
    x_BTD: Hidden,
    table_VD: Array,
    bias_V: Array | None,
    labels_BT: Array,
    weights_BT: Array,
    *,
    chunk: int,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    words: int | None = None,
) -> HeadLoss:
    """sum of weights x cross_entropy(x table^T + bias, labels), T taken `chunk` positions at a time.

    On a mesh, rows, positions and vocabulary are split as the logical axes `batch`, `length` and `act_vocab` say: each
    device computes its positions' logits for its part of the vocabulary, and the table's gradient is summed over
    positions once, at the end. Where the shards of `length` do not divide T, each of them computes all positions.

    Args:
        table_VD, bias_V: fp32 parameters; products are in x's dtype, log-sum-exp and sums in fp32.
        weights_BT: fp32; 0 leaves a position out.
        chunk: divides T.
        z_loss: coefficient of log(Z)^2 (Chowdhery et al. 2022, section 5).
        label_smoothing: share of the target spread evenly over the vocabulary (Szegedy et al. 2016, section 7).
        words: of the vocabulary, where the table has rows beyond: those never win and have no gradient.

    Raises:
        ConfigError: `chunk` does not divide T, or the shards of the sequence do not divide `chunk`.
    """
    length = x_BTD.shape[1]
    check_chunk(chunk, length)
    words = table_VD.shape[0] if words is None else words
    bias_V = jnp.zeros(table_VD.shape[0], table_VD.dtype) if bias_V is None else bias_V
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        settings = _Settings(chunk, z_loss, label_smoothing, words, (), (), ())
        return HeadLoss(*_weighted_loss(settings, None, x_BTD, table_VD, bias_V, labels_BT, weights_BT))
    rows, vocab = nn.logical_to_mesh_axes(("rows", "act_vocab"))
    rows, vocab = (
        tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if mesh.shape[axis] > 1)
        for axes in (rows, vocab)
    )
    shards = math.prod(mesh.shape[axis] for axis in vocab)
    if table_VD.shape[0] % shards:
        raise ConfigError(f"a vocabulary of {table_VD.shape[0]} rows is not divisible by mesh {vocab} = {shards}")
    lies = _spread(length)
    settings = _Settings(chunk // lies.shards, z_loss, label_smoothing, words, rows, vocab, lies.axes)
    return HeadLoss(*_weighted_loss(settings, mesh, x_BTD, table_VD, bias_V, labels_BT, weights_BT))


def check_chunk(chunk: int, length: int) -> None:
    """Whether the logits of `length` scored positions a row can be computed `chunk` positions at a time.

    Raises:
        ConfigError: `chunk` does not divide them, or the shards of the sequence, under the mesh in force, not `chunk`.
    """
    name, fitting = f"execution.compute.head_chunk = {chunk}", fitting_chunks(length)
    use = f"use one of {', '.join(map(str, fitting))}"
    if chunk < 1 or length % chunk:
        raise ConfigError(f"{name} does not divide the {length} scored positions of a row; {use}")
    if chunk not in fitting:
        shards = _spread(length).shards
        raise ConfigError(f"{name} is not divisible by the {shards} shards of the sequence it spreads over; {use}")


def fitting_chunks(length: int) -> list[int]:
    """What `check_chunk` takes for `length` positions, ascending."""
    shards = _spread(length).shards
    return [n for n in range(shards, length + 1, shards) if length % n == 0]


def _spread(length: int) -> sequence.Split:
    """The shards that a chunk of `length` positions spreads over; where they do not divide those, each has all.

    Those are a few masked positions.
    """
    lies = sequence.split()
    return sequence.WHOLE if length % lies.shards else lies


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_loss(settings, mesh, x_BTD, table_VD, bias_V, labels_BT, weights_BT):
    return _run(settings, mesh, False, x_BTD, table_VD, bias_V, labels_BT, weights_BT)[:2]


def _forward(settings, mesh, *operands):
    loss, right, *gradients = _run(settings, mesh, True, *operands)
    return (loss, right), tuple(gradients)


def _backward(settings, mesh, gradients, cotangents):
    dx, dtable, dbias = gradients
    factor = cotangents[0]
    return (dx * factor).astype(dx.dtype), dtable * factor, dbias * factor, None, None


_weighted_loss.defvjp(_forward, _backward)


@jax.named_scope("linear_cross_entropy")
def _run(settings: _Settings, mesh, want_gradients: bool, *operands):
    body = partial(_local, settings, want_gradients)
    if mesh is None:
        return body(*operands)
    rows, vocab = settings.rows or None, settings.vocab or None
    by_row, by_word = PartitionSpec(rows, settings.length or None), PartitionSpec(vocab)
    scalar = PartitionSpec()
    out = (scalar, scalar, by_row, by_word, by_word) if want_gradients else (scalar, scalar)
    inputs = (by_row, by_word, by_word, by_row, by_row)
    return jax.shard_map(body, mesh=mesh, in_specs=inputs, out_specs=out, check_vma=False)(*operands)


def _local(settings: _Settings, want_gradients: bool, x_BTD, table_VD, bias_V, labels_BT, weights_BT):
    """What one device computes: its positions, its words, sums over the others where they are needed."""
    dtype = x_BTD.dtype
    table, bias = table_VD.astype(dtype), bias_V.astype(dtype)
    first = _first_word(settings.vocab, table.shape[0])
    words = settings.words
    padded = words < table.shape[0] * math.prod(jax.lax.axis_size(axis) for axis in settings.vocab)

    def one(carry, operands):
        x_BCD, labels_BC, weights_BC = operands
        logits_BCV = (jnp.einsum("BCD,VD->BCV", x_BCD, table) + bias).astype(jnp.float32)
        ids = first + jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2)
        real = ids < words if padded else jnp.ones((), bool)
        logits_BCV = jnp.where(real, logits_BCV, NEVER)
        is_label = ids == labels_BC[..., None]
        high = _across(jax.lax.pmax, jnp.max(logits_BCV, -1), settings.vocab)
        exp_BCV = jnp.exp(logits_BCV - high[..., None])
        total = _across(jax.lax.psum, jnp.sum(exp_BCV, -1), settings.vocab)
        picked = _across(jax.lax.psum, jnp.sum(jnp.where(is_label, logits_BCV, 0), -1), settings.vocab)
        log_z = jnp.log(total) + high
        smooth = settings.label_smoothing
        target = picked
        if smooth:
            mean = _across(jax.lax.psum, jnp.sum(jnp.where(real, logits_BCV, 0), -1), settings.vocab) / words
            target = (1 - smooth) * picked + smooth * mean
        loss = log_z - target + settings.z_loss * log_z**2
        sums = jnp.sum(loss * weights_BC), jnp.sum((picked >= high) * weights_BC)
        if not want_gradients:
            return jax.tree.map(jnp.add, carry, sums), None
        probability = exp_BCV / total[..., None]
        dlogits = probability * (1 + 2 * settings.z_loss * log_z)[..., None]
        dlogits = dlogits - (1 - smooth) * is_label - (smooth / words * real if smooth else 0.0)
        dlogits = (dlogits * weights_BC[..., None]).astype(dtype)
        dx = jnp.einsum("BCV,VD->BCD", dlogits, table)
        dtable = jnp.einsum("BCV,BCD->VD", dlogits, x_BCD, preferred_element_type=jnp.float32)
        dbias = jnp.sum(dlogits.astype(jnp.float32), (0, 1))
        return jax.tree.map(jnp.add, carry, (*sums, dtable, dbias)), dx

    zeros = (jnp.zeros((), jnp.float32),) * 2
    if want_gradients:
        zeros += (jnp.zeros(table.shape, jnp.float32), jnp.zeros(bias.shape, jnp.float32))
    chunks = [_split(array, settings.chunk) for array in (x_BTD, labels_BT, weights_BT)]
    sums, dx = jax.lax.scan(one, zeros, tuple(chunks))
    sums = [_across(jax.lax.psum, value, settings.rows + settings.length) for value in sums]
    if not want_gradients:
        return tuple(sums)
    loss, right, dtable, dbias = sums
    dx_BTD = _across(jax.lax.psum, jnp.moveaxis(dx, 0, 1).reshape(x_BTD.shape), settings.vocab)
    return loss, right, dx_BTD, dtable.astype(table_VD.dtype), dbias.astype(bias_V.dtype)


def _split(array: Array, chunk: int) -> Array:
    """[B, T, ...] as [T / chunk, B, chunk, ...]."""
    rows, length, *rest = array.shape
    return jnp.moveaxis(array.reshape(rows, length // chunk, chunk, *rest), 1, 0)


def _across(reduce, value: Array, axes: tuple[str, ...]) -> Array:
    return reduce(value, axes) if axes else value


def _first_word(axes: tuple[str, ...], words: int) -> Array | int:
    """The id of this device's first word."""
    return jax.lax.axis_index(axes) * words if axes else 0
