"""Attention over a split sequence equals the reference on one device: values and gradients, both forms, every mask."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.nn import sequence
from bertgpt_jax.nn.attention import PathChoice, dot_product_attention, reference_attention
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.nn.ring import ring_attention
from bertgpt_jax.nn.splash import splash_attention

pytestmark = pytest.mark.usefixtures("compiled_afresh")

LENGTH = 48
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@contextlib.contextmanager
def mesh_of(shards: int, heads: int = 1) -> Iterator[None]:
    """Sequences in `shards` parts; with heads, those and rows are split too."""
    rows = 2 if shards * heads < 8 and heads > 1 else 1
    devices = np.array(jax.devices()[: rows * shards * heads]).reshape(rows, shards, heads)
    mesh = jax.sharding.Mesh(devices, ("r", "s", "h"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rules = (("batch", "r"), ("length", "s"), ("act_heads", "h"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def inputs(rows: int = 2, length: int = LENGTH, heads: int = 2, width: int = 4) -> list[jax.Array]:
    """q, k, v and the output's gradient."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((rows, length, heads, width)), jnp.float32) for _ in range(4)]


def segments(length: int = LENGTH) -> jax.Array:
    """Three segments and padding in one row, nearly nothing but padding in the other."""
    ids = np.zeros((2, length), np.int32)
    for segment, end in enumerate((length // 3, length // 3 + 5, length - 7)):
        ids[0, (ids[0] > 0).sum() : end] = segment + 1
    ids[1, :3] = 1
    return jnp.asarray(ids)


def masks(length: int = LENGTH) -> dict[str, AttentionMask]:
    ids = segments(length)
    own = dict(q_segments_BT=ids, kv_segments_BS=ids)
    return {
        "full": AttentionMask(),
        "causal": AttentionMask(causal=True),
        "window": AttentionMask(window=7),
        "causal window": AttentionMask(causal=True, window=9),
        "ragged": AttentionMask(q_segments_BT=(ids > 0) * 1, kv_segments_BS=(ids > 0) * 1),
        "segments": AttentionMask(**own),
        "causal segments": AttentionMask(causal=True, **own),
        "nothing to see": AttentionMask(causal=True, q_segments_BT=ids, kv_segments_BS=jnp.roll(ids, 4, 1)),
    }


def both(attention: Callable, mask: AttentionMask, q, k, v, g) -> tuple:
    """(output, gradients) of sum(output * g), compiled."""

    def loss(q, k, v, g, mask):
        out = attention(q, k, v, mask)
        return jnp.sum(out * g), out

    compiled = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True)).lower(q, k, v, g, mask).compile(FAST_COMPILE)
    gradients, out = compiled(q, k, v, g, mask)
    return out, *gradients


def reference(mask: AttentionMask, *qkvg: jax.Array) -> tuple:
    """`both` of the reference."""
    return both(reference_attention, mask, *qkvg)


def reordered(tree, order: np.ndarray):
    """Sequences brought into an order; those of an `AttentionMask` too."""
    return jax.tree.map(lambda x: x[:, order], tree)


def check(got: tuple, want: tuple, tolerance: float = 1e-5) -> None:
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=tolerance)


WHEN = dict.fromkeys([("segments", 2), ("causal window", 4), ("nothing to see", 2)], ()) | dict.fromkeys(
    [("full", 8), ("causal", 4), ("window", 2), ("ragged", 8), ("causal segments", 4), ("nothing to see", 4)],
    pytest.mark.slow,
)
"""The others are long."""


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        pytest.param(name, shards, marks=WHEN.get((name, shards), pytest.mark.long))
        for name in masks()
        for shards in (2, 4, 8)
    ],
)
def test_ring_equals_the_reference(name: str, shards: int) -> None:
    """Tiles of 3: several a shard, so that those that the mask leaves out are skipped."""
    mask, qkvg = masks()[name], inputs()
    want = reference(mask, *qkvg)
    if name == "nothing to see":
        assert any(not np.asarray(want[0])[row, t].any() for row in range(2) for t in range(LENGTH))
    with mesh_of(shards):
        check(both(lambda *a: ring_attention(*a, tile=3), mask, *qkvg), want)


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        ("causal", 4),
        *(
            pytest.param(f"causal{rest}", n, marks=pytest.mark.slow)
            for rest in (" segments", " window")
            for n in (2, 8)
        ),
    ],
)
def test_ring_in_zigzag_order_equals_the_reference(name: str, shards: int) -> None:
    mask, qkvg = masks()[name], inputs()
    order = sequence.zigzag_order(LENGTH, shards)
    with mesh_of(shards, heads=2 if shards < 8 else 1):
        got = both(lambda *a: ring_attention(*a, zigzag=True), *reordered((mask, *qkvg), order))
    check(got, reordered(reference(mask, *qkvg), order))


@pytest.mark.slow
def test_ring_in_bfloat16_is_as_near_as_the_reference() -> None:
    mask, (q, k, v, g) = masks()["causal segments"], inputs()
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    with mesh_of(4):
        got = both(ring_attention, mask, *low, g)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    check([x.astype(jnp.float32) for x in got], reference(mask, q, k, v, g), 0.05)


@pytest.mark.parametrize("zigzag", [False, True])
def test_every_shard_of_a_causal_ring_has_the_same_work(zigzag: bool) -> None:
    """Pairs that a shard's queries see, counted; only in zigzag are they as many everywhere."""
    seen = []
    for shard in range(4):
        q = np.asarray(sequence.indices(jnp.int32(shard), LENGTH, 4, zigzag))
        assert zigzag == (not np.array_equal(q, np.arange(LENGTH).reshape(4, -1)[shard]))
        seen.append(int((q[:, None] >= np.arange(LENGTH)).sum()))
    assert (len(set(seen)) == 1) == zigzag


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_zigzag_brings_each_token_to_its_place(shards: int) -> None:
    x = jnp.arange(2 * LENGTH * 3).reshape(2, LENGTH, 3)
    with mesh_of(shards):
        moved = jax.jit(lambda x: sequence.to_zigzag(x, "batch", "length", None))(x)
        text = jax.jit(lambda x: sequence.to_zigzag(x, "batch", "length", None)).lower(x).compile().as_text()
    np.testing.assert_array_equal(moved, x[:, sequence.zigzag_order(LENGTH, shards)])
    assert "all-gather" not in text and "collective-permute" in text
    places = [np.asarray(sequence.indices(jnp.int32(i), LENGTH, shards, True)) for i in range(shards)]
    np.testing.assert_array_equal(np.concatenate(places), sequence.zigzag_order(LENGTH, shards))


def shapes(text: str) -> set[tuple[int, ...]]:
    """Of every array in a compiled program."""
    return {tuple(map(int, found.split(","))) for found in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)}


@pytest.mark.parametrize("form", ["ring", "all_gather"])
def test_a_ring_never_holds_all_keys(form: str) -> None:
    """Read off the compiled forward and backward pass; gathered keys, the control, are seen there."""
    q, k, v, g = inputs(rows=1, length=16 * 7, heads=3, width=5)
    choice = PathChoice(form=form)

    @jax.checkpoint
    def layer(q, k, v):
        return dot_product_attention(q, k, v, masks()["causal"], choice=choice)

    def loss(q, k, v, g):
        """Two layers in a loop, recomputed: what is kept for all of them is in the program too."""
        q = jax.lax.scan(lambda q, _: (layer(q, k, v), None), q, None, length=2)[0]
        return jnp.sum(q * g)

    with mesh_of(8):
        lies = jax.sharding.PartitionSpec(None, "s")
        step = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=lies, out_shardings=lies)
        found = shapes(step.lower(q, k, v, g).compile(FAST_COMPILE).as_text())
    whole = {shape for shape in found if 112 in shape}
    assert any(14 in shape for shape in found), "a shard's keys"
    assert bool(whole) == (form == "all_gather"), whole
    assert max(np.prod(shape) for shape in found) <= 2 * 14 * 14 * 3 or form == "all_gather", "no more than two tiles"


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        ("causal", 2),
        pytest.param("segments", 2, marks=pytest.mark.slow),
        pytest.param("causal window", 4, marks=pytest.mark.slow),
    ],
)
def test_splash_with_gathered_keys_equals_the_reference(name: str, shards: int) -> None:
    """The kernel, emulated; causal ones in zigzag order."""
    length = 256 * shards
    mask, qkvg = masks(length)[name], inputs(length=length, width=64)
    order = sequence.zigzag_order(length, shards) if mask.causal else np.arange(length)
    want = both(reference_attention, mask, *qkvg)
    with mesh_of(shards, heads=2):
        got = both(
            lambda *a: splash_attention(*a, zigzag=mask.causal, interpret=True), *reordered((mask, *qkvg), order)
        )
    check(got, reordered(want, order), 2e-5)
