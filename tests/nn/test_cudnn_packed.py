"""Packed rows by cuDNN: what the kernel is told, against a plain loop, and what it then computes, emulated.

The emulation does what cuDNN's documentation says of ragged tensors: entry i of the batch is the `lengths[i]` tokens
that begin `offsets[i]` numbers into the array and attends to itself alone; what no entry covers is left as it was.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo as private

from bertgpt_jax.nn import cudnn_packed
from bertgpt_jax.nn.attention import PathChoice, dot_product_attention
from bertgpt_jax.nn.cudnn import obstacles
from bertgpt_jax.nn.masks import AttentionMask, causal_mask, segment_mask
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.parallel.sharding import mesh_context
from bertgpt_jax.planning.gpu import stand_in
from bertgpt_jax.planning.places import parse

B, T, N, H, MOST = 4, 16, 2, 8, 3
ROWS = np.array(
    [
        [1] * 5 + [2] * 4 + [3] * 7,
        [1] * 1 + [2] * 12 + [0] * 3,
        [1] * 16,
        [0] * 16,
    ],
    np.int32,
)
MASKS = {"full": segment_mask(ROWS, max_segments=MOST), "causal": causal_mask(ROWS, max_segments=MOST)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def emulated(q, k, v, offsets, lengths, scale: float, causal: bool):
    return uninitialised(forward(q, k, v, offsets, lengths, scale, causal), offsets, lengths)


def forward(q_BTNH, k_BTNH, v_BTNH, offsets, lengths, scale: float, causal: bool):
    rows, length, heads, width = q_BTNH.shape
    q, k, v = (x.reshape(-1, heads, width) for x in (q_BTNH, k_BTNH, v_BTNH))
    place, size = jnp.arange(length), lengths.reshape(-1, 1)
    begin = offsets.reshape(-1)[: lengths.size, None] // (heads * width)
    mine = jnp.where(place < size, begin + place, rows * length)  # [E, T]; outside: read as 0, not written
    a, b, c = (x.at[mine].get(mode="fill", fill_value=0) for x in (q, k, v))
    allowed = (place < size)[:, None, None] & (place[:, None] >= place[None, :] if causal else True)
    weights = jax.nn.softmax(jnp.where(allowed, scale * jnp.einsum("etnh,esnh->ents", a, b), -1e30))
    out = jnp.einsum("ents,esnh->etnh", weights, c)
    return jnp.zeros_like(q).at[mine].set(out, mode="drop").reshape(q_BTNH.shape)


def uninitialised(x_BTNH, offsets, lengths):
    """NaN where no entry reaches."""
    rows, length, heads, width = x_BTNH.shape
    token = jnp.arange(rows * length)[:, None]
    begin, size = offsets.reshape(-1)[: lengths.size] // (heads * width), lengths.reshape(-1)
    covered = jnp.any((token >= begin) & (token < begin + size), axis=1)
    return jnp.where(covered.reshape(rows, length, 1, 1), x_BTNH, jnp.nan)


def emulated_fwd(q, k, v, offsets, lengths, scale: float, causal: bool):
    return emulated(q, k, v, offsets, lengths, scale, causal), (q, k, v, offsets, lengths)


def emulated_bwd(scale: float, causal: bool, kept, cotangent):
    *qkv, offsets, lengths = kept
    _, pull = jax.vjp(lambda *x: forward(*x, offsets, lengths, scale, causal), *qkv)
    return *(uninitialised(x, offsets, lengths) for x in pull(cotangent)), None, None


emulated.defvjp(emulated_fwd, emulated_bwd)


def stand_in_kernel(
    query, key, value, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, qkv_layout
) -> jax.Array:
    """The private function, but for the kernel: jax's own reading of offsets and lengths, then the emulation."""
    assert qkv_layout == "BTNH" and q_offsets.dtype == q_seqlen.dtype == jnp.int32
    assert q_offsets.shape == (q_seqlen.shape[0], q_seqlen.shape[1] + 1)
    lengths, _, offsets, kv = private._fix_seqlen_offsets(q_seqlen, kv_seqlen, q_offsets, kv_offsets, query, key)
    assert kv.shape == offsets.shape
    return emulated(query, key, value, offsets, lengths, scale, mask_type == private.MaskType.PADDING_CAUSAL)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "dot_product_attention", stand_in_kernel)


def inputs(rows: int = B, heads: int = N) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((rows, T, heads, H)), jnp.float32) for _ in range(4)]


def forward_and_gradients(attend, mask: AttentionMask, rows: int = B, heads: int = N) -> list[jax.Array]:
    def run(*qkv_cotangent):
        out, pull = jax.vjp(lambda *x: attend(*x, mask), *qkv_cotangent[:3])
        return [out, *pull(qkv_cotangent[3])]

    return jax.jit(run)(*inputs(rows, heads))


# ---------------------------------------------------------------- what the kernel is told

segment_places = jax.jit(cudnn_packed.segment_places, static_argnums=1)


@given(sizes=st.lists(st.lists(st.integers(1, 6), max_size=4), min_size=3, max_size=3))
def test_places_are_those_of_a_plain_loop(sizes: list[list[int]]) -> None:
    length, most = 24, 5
    segments, offsets, lengths = [], [], []
    for row in sizes:
        ids = [number for number, size in enumerate(row, start=1) for _ in range(size)]
        segments.append(ids + [0] * (length - len(ids)))
        runs = row + [length - len(ids)] * (length > len(ids))
        unused = [-1] * (most - len(runs))
        lengths.append(runs + unused)
        offsets.append([sum(runs[:i]) for i in range(len(runs))] + [*unused, -1])
    found = segment_places(np.array(segments, np.int32), most)
    for got, wanted in zip(found, (offsets, lengths, [False] * len(sizes)), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "row",
    [
        [1, 1, 2, 2, 3, 3, 4, 0],
        [1, 1, 2, 2, 1, 1, 0, 0],
        [2, 2, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 2, 2, 2, 2],
    ],
    ids=["too many", "in two parts", "descending", "padding first", "padding between"],
)
def test_other_rows_are_told_apart(row: list[int]) -> None:
    broken = segment_places(np.array([row, [1] * 8], np.int32), MOST + 1)[2]
    assert broken.tolist() == [True, False]


# ---------------------------------------------------------------- what it then computes


@pytest.mark.parametrize("name", MASKS)
def test_equals_the_reference(name: str, kernel: None) -> None:
    """Forward and gradients, padding and rows of nothing else included; nothing is left uninitialised."""
    mine = forward_and_gradients(cudnn_packed.packed_attention, MASKS[name])
    for got, wanted in zip(mine, forward_and_gradients(dot_product_attention, MASKS[name]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_equals_the_reference_on_a_mesh(kernel: None) -> None:
    """Rows and heads split: offsets count from a device's own first row."""
    mask = causal_mask(np.concatenate([ROWS, ROWS[::-1]]), max_segments=MOST)
    expected = forward_and_gradients(dot_product_attention, mask, 8, 4)
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    with mesh_context(mesh):
        mine = forward_and_gradients(cudnn_packed.packed_attention, mask, 8, 4)
    for got, wanted in zip(mine, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_a_row_it_cannot_mean_yields_nan(kernel: None) -> None:
    rows = ROWS.copy()
    rows[1, -1] = 1  # segment 1 again, behind the padding
    out, *gradients = forward_and_gradients(cudnn_packed.packed_attention, causal_mask(rows, max_segments=MOST))
    assert np.isnan(out[1]).any() and np.isfinite(out[np.array([0, 2, 3])]).all()
    assert all(np.isnan(gradient[1]).any() for gradient in gradients)


# ---------------------------------------------------------------- when it may be chosen


def reasons(mask: AttentionMask, shape: tuple[int, ...] = (2, 128, 4, 64), kv_length: int = 128) -> str:
    return "; ".join(obstacles(shape, kv_length, jnp.dtype("bfloat16"), mask, False))


def long_mask(**changes) -> AttentionMask:
    return causal_mask(jnp.ones((2, 128), jnp.int32), max_segments=MOST).replace(**changes)


def test_what_stands_in_the_way() -> None:
    assert "compute capability 9.0 (Hopper)" in reasons(long_mask())
    with stand_in(parse("a100:1")):
        assert "compute capability 9.0 (Hopper)" in reasons(long_mask())
    with stand_in(parse("h200:1")):
        assert not reasons(long_mask())
        assert "set objective.examples.max_segments" in reasons(long_mask(max_segments=None))
        assert "there is a window in them" in reasons(long_mask(window=8))
        assert "queries and keys are not the same" in reasons(long_mask(causal=False), kv_length=256)
        assert "more than 2^31 numbers" in reasons(long_mask(), (2**14, 2048, 16, 64), 2048)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda patch: patch.setattr(cudnn_packed, "LAST_KNOWN_JAX", (0, 9)), "is newer than 0.9"),
        (lambda patch: patch.setattr(private, "dot_product_attention", lambda query, key: None), "lacks kv_offsets"),
        (lambda patch: patch.setattr(private, "get_max_seg_per_batch", lambda offsets: 4), "is another one"),
        (lambda patch: patch.delattr(private, "MaskType"), "is another one"),
    ],
    ids=["newer jax", "other arguments", "other offsets", "no mask types"],
)
def test_a_private_function_that_changed_is_left_alone(change, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn_packed.private_kernels.cache_clear()
    change(monkeypatch)
    try:
        assert words in reasons(long_mask())
    finally:
        monkeypatch.undo()
        cudnn_packed.private_kernels.cache_clear()


def test_the_private_function_is_the_known_one() -> None:
    """Of this jax; a failure here means that `cudnn_packed` must be read again, not that packed rows fail."""
    module, why = cudnn_packed.private_kernels()
    assert module is private and not why


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_in_the_program_for_a_gpu(causal: bool) -> None:
    """Lowered for CUDA without one: one fused forward and backward over M segments a row, no softmax by XLA."""
    mask, x = long_mask(causal=causal), jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)

    def loss(q, k, v):
        return jnp.sum(dot_product_attention(q, k, v, mask, choice=PathChoice("auto", "gpu")).astype(jnp.float32))

    with stand_in(parse("h200:1")):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    calls = re.findall(r"custom_call @(__cudnn\$fmha\w+)", text)
    assert sorted(calls) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"], calls
    assert len(re.findall(rf"max_seg_per_batch\\22: {MOST + 1}\b", text)) == 2
    assert len(re.findall(rf"mask_type\\22: \\22PADDING{'_CAUSAL' if causal else ''}\\22", text)) == 2
    assert "stablehlo.exponential" not in text
