"""The fingerprint is one number for every mesh, and another one for every change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bertgpt_jax.training import fingerprint
from bertgpt_jax.training.fingerprint import combine, describe_leaves, fingerprint_tree, flatten, state_fingerprint


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _numpy_fingerprint(x: np.ndarray) -> int:
    """The definition once more, in NumPy: a fingerprint in an old checkpoint must keep its meaning."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    bits = np.ascontiguousarray(x).view(unsigned).astype(np.uint32)
    position = np.zeros(x.shape, np.uint32)
    for axis in range(x.ndim):
        shape = [1] * x.ndim
        shape[axis] = -1
        position = position * np.uint32(1000003) + np.arange(x.shape[axis], dtype=np.uint32).reshape(shape)
    salt = (position + np.uint32(1)) * np.uint32(0x9E3779B1)
    return int(np.sum(_mix(_mix(bits ^ salt) + salt), dtype=np.uint32))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "float8_e4m3fn"]
)
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4)])
def test_equals_the_definition(dtype: str, shape: tuple[int, ...]) -> None:
    bits = np.random.default_rng(0).integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), np.uint8)
    x = bits.view(jnp.dtype(dtype)).reshape(shape)
    assert fingerprint_tree({"x": jnp.asarray(x)}) == {"x": _numpy_fingerprint(x)}


@pytest.mark.parametrize("shape", [(37,), (37, 5), (3, 40, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_array_in_slabs(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: str) -> None:
    """As many rows at a time as fit, the last slab shorter, a row larger than a slab alone."""
    x = np.random.default_rng(3).standard_normal(shape).astype(jnp.dtype(dtype))
    calls = []
    slab = fingerprint._slab_fingerprint
    monkeypatch.setattr(fingerprint, "_SLAB_BYTES", 100)
    monkeypatch.setattr(fingerprint, "_slab_fingerprint", lambda *args: calls.append(args) or slab(*args))
    found = fingerprint_tree({"b": {"x": jnp.asarray(x), "y": jnp.zeros(3)}, "b-a": jnp.ones(2)})
    whole = np.asarray(jax.jit(fingerprint.fingerprint_vector)([jnp.asarray(x), jnp.zeros(3), jnp.ones(2)]))
    assert list(found.values()) == whole.tolist() and list(found) == ["b/x", "b/y", "b-a"]
    assert (len(calls) > 1) == (x.nbytes > 100)


@pytest.mark.parametrize("shape", [(), (1,), (37,), (36, 5), (3, 40, 2)])
def test_mixed_in_a_loop(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    """In parts that divide the array or not, the last one shorter, a row larger than a part."""
    monkeypatch.setattr(fingerprint, "_LOOP_BYTES", 48)
    leaves = [jnp.asarray(np.random.default_rng(4).standard_normal(shape), jnp.float32), jnp.arange(40)]
    looped, whole = (
        jax.jit(lambda t, s=s: fingerprint.fingerprint_vector(t, in_slabs=s))(leaves) for s in (True, False)
    )
    assert looped.tolist() == whole.tolist()


def test_every_mesh_gives_the_same() -> None:
    w = np.random.default_rng(1).standard_normal((16, 8, 4)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    specs = (P(), P("a"), P(None, "b"), P("b", "a"), P(("a", "b")), P("a", None, "b"), P(None, ("a", "b")))
    found = {state_fingerprint({"w": jax.device_put(w, NamedSharding(mesh, spec))}) for spec in specs}
    found.add(state_fingerprint({"w": jax.device_put(w, jax.devices()[3])}))
    found.add(state_fingerprint({"w": w}))
    assert len(found) == 1


_BASE = np.random.default_rng(2).standard_normal((37, 11)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(row=st.integers(0, 36), column=st.integers(0, 10), bit=st.integers(0, 31))
def test_any_flipped_bit_changes_it(row: int, column: int, bit: int) -> None:
    flipped = _BASE.copy()
    flipped.view(np.uint32)[row, column] ^= np.uint32(1 << bit)
    assert fingerprint_tree({"x": flipped}) != fingerprint_tree({"x": _BASE})


@pytest.mark.parametrize(
    "change",
    [
        lambda x: -x,
        lambda x: x[::-1],
        lambda x: x[:, ::-1],
        lambda x: np.roll(x, 1, 0),
        lambda x: np.where(x == x[3, 4], x[4, 3], np.where(x == x[4, 3], x[3, 4], x)),
        lambda x: np.zeros_like(x),
    ],
    ids=["all signs", "rows reversed", "columns reversed", "rolled", "two swapped", "zeros"],
)
def test_changes_of_many_elements_do_not_cancel(change) -> None:
    assert fingerprint_tree({"x": change(_BASE)}) != fingerprint_tree({"x": _BASE})


def test_the_combined_one_sees_path_shape_dtype_and_not_the_order() -> None:
    zeros = jnp.zeros((2, 3), jnp.float32)
    base = state_fingerprint({"a": zeros, "b": zeros})
    assert len(base) == 32
    others = [
        {"a": zeros, "c": zeros},
        {"a": zeros, "b": zeros.reshape(3, 2)},
        {"a": zeros, "b": zeros.astype(jnp.bfloat16)},
        {"a": zeros},
        {"a": zeros, "b": zeros.at[1, 1].set(1e-45)},
    ]
    assert len({base, *map(state_fingerprint, others)}) == 6
    numbers, leaves = fingerprint_tree({"a": zeros, "b": zeros}), describe_leaves({"a": zeros, "b": zeros})
    assert combine(dict(reversed(numbers.items())), leaves) == base


def test_paths_of_a_state() -> None:
    state = {"params": {"layers": {"w": 1}}, "optimizer": ({"mu": 2}, (), [3]), "carry": (), "step": 4}
    assert list(flatten(state).items()) == [
        ("optimizer/0/mu", 2),
        ("optimizer/2/0", 3),
        ("params/layers/w", 1),
        ("step", 4),
    ]
