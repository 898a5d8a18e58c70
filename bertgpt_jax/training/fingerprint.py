"""A fingerprint of sharded arrays, computed where they lie, equal for every mesh.

Orbax stores no checksum of array data: a flipped bit on disk comes back as another weight and no error. Each leaf gets
a uint32: every element's bits are mixed with its position and the results summed modulo 2^32. Integer sums commute, so
any sharding gives the same value; the mixing is a bijection for a fixed position, so that a change of one element
always changes the sum, and it is not linear in the bits, so that changes of many (all signs flipped) do not cancel.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from bertgpt_jax.parallel.sharding import flatten

_SLAB_BYTES = 16 << 20
_LOOP_BYTES = 1 << 20

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _mix(x: Array) -> Array:
    """Finaliser of MurmurHash3 (fmix32), a bijection of uint32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def leaf_fingerprint(x: Array, first: Array | int = 0) -> UInt32[Array, ""]:
    """The fingerprint of one array of any dtype and shape, as a uint32 scalar; traceable.

    Args:
        first: the row of a whole array at which `x`, a part of it, begins; its parts' fingerprints add up (mod 2^32).
    """
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize == 1:
        x = x.astype(jnp.uint8)  # also 4-bit integers, which have no bitcast
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index = index if axis else index + jnp.asarray(first, jnp.uint32)
        position = position * jnp.uint32(1000003) + index
    salt = (position + jnp.uint32(1)) * jnp.uint32(0x9E3779B1)
    return jnp.sum(_mix(_mix(bits ^ salt) + salt), dtype=jnp.uint32)


def fingerprint_vector(tree: Any, *, in_slabs: bool = False) -> UInt32[Array, " leaves"]:
    """The fingerprints of a tree's leaves, in the tree's order, as one array; traceable.

    Args:
        in_slabs: large leaves, which must not be sharded, are mixed part by part. Compilers for CPUs do not merge the
            mixing with the sum: at once, it writes and reads several times the memory of the leaf.
    """
    leaves = jax.tree_util.tree_leaves(tree)
    mix = _looped_fingerprint if in_slabs else leaf_fingerprint
    return jnp.stack([mix(x) for x in leaves]) if leaves else jnp.zeros(0, jnp.uint32)


def _looped_fingerprint(x: Array) -> UInt32[Array, ""]:
    """`leaf_fingerprint` of one array as a loop over parts of it that stay in a cache."""
    if x.ndim == 0 or x.nbytes <= _LOOP_BYTES:
        return leaf_fingerprint(x)
    rows = max(_LOOP_BYTES * len(x) // x.nbytes, 1)
    parts = len(x) // rows

    def add(i: Array, total: Array) -> Array:
        return total + leaf_fingerprint(jax.lax.dynamic_slice_in_dim(x, i * rows, rows), i * rows)

    total = jax.lax.fori_loop(0, parts, add, jnp.uint32(0))
    return total + leaf_fingerprint(x[parts * rows :], parts * rows) if parts * rows < len(x) else total


_fingerprint_on_device = jax.jit(fingerprint_vector)


@partial(jax.jit, static_argnums=2)
def _slab_fingerprint(x: Array, first: Array, rows: int) -> UInt32[Array, ""]:
    return leaf_fingerprint(jax.lax.dynamic_slice_in_dim(x, first, rows), first)


def _in_slabs(x: jax.Array) -> int:
    """`leaf_fingerprint` of a large array on one device: mixed all at once, its bits take its memory twice more."""
    rows = max(_SLAB_BYTES * len(x) // x.nbytes, 1)
    begins = range(0, len(x), rows)
    return sum(int(_slab_fingerprint(x, np.int32(i), min(rows, len(x) - i))) for i in begins) % 2**32


def fingerprint_tree(tree: Any) -> dict[str, int]:
    """Path to fingerprint of every leaf. With several processes, all of them must call this."""
    flat = flatten(tree)
    large = {
        path for path, x in flat.items()
        if isinstance(x, jax.Array) and x.nbytes > _SLAB_BYTES and len(x.sharding.device_set) == 1
    }  # fmt: skip
    found = {path: _in_slabs(flat[path]) for path in large}
    rest = {path: x for path, x in flat.items() if path not in large}
    values = np.asarray(jax.device_get(_fingerprint_on_device(list(rest.values()))))
    found |= {path: int(value) for path, value in zip(rest, values, strict=True)}
    return {path: found[path] for path in flat}


def combine(fingerprints: dict[str, int], leaves: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    """One hex string for a tree, from its leaves' fingerprints and (dtype, shape); the order does not matter."""
    lines = [f"{p} {leaves[p][0]} {list(leaves[p][1])} {fingerprints[p]:08x}" for p in sorted(fingerprints)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def describe_leaves(tree: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Path to (dtype name, shape) of every leaf, arrays or `ShapeDtypeStruct`s."""
    return {path: (jnp.dtype(x.dtype).name, tuple(x.shape)) for path, x in flatten(tree).items()}


def state_fingerprint(state: Any) -> str:
    """32 hex digits that name the exact bits of a state on any mesh; computed on the device, collective."""
    return combine(fingerprint_tree(state), describe_leaves(state))
