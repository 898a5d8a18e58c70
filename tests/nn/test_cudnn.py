"""What cuDNN's kernels cannot serve is found before they are called, a sentence each."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from bertgpt_jax.nn.cudnn import obstacles
from bertgpt_jax.nn.masks import AttentionMask, causal_mask

SHAPE = (2, 128, 4, 64)


def found(shape=SHAPE, kv_length=128, dtype="bfloat16", mask=None, dropping=False, shards=1) -> list[str]:
    return obstacles(shape, kv_length, jnp.dtype(dtype), causal_mask() if mask is None else mask, dropping, shards)


@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_they_serve(width: int, dtype: str) -> None:
    assert found((2, 128, 4, width), dtype=dtype) == []
    assert found((2, 128, 4, width), dtype=dtype, mask=AttentionMask(causal=True, window=16)) == []


@pytest.mark.parametrize(
    ("case", "word"),
    [
        (dict(dtype="float32"), "dtype float32 is none of bfloat16, float16"),
        (dict(shape=(2, 128, 4, 60)), "head width 60 is no multiple of 8"),
        (dict(shape=(2, 128, 4, 136)), "head width 136 is no multiple of 8 up to 128"),
        (dict(shape=(2, 127, 4, 64), kv_length=127), "lengths 127 and 127 are not even"),
        (dict(kv_length=127, mask=AttentionMask()), "lengths 128 and 127 are not even"),
        (dict(mask=AttentionMask(window=16)), "the window looks both ways"),
        (dict(kv_length=256), "causal attention of 128 queries to 256 keys"),
        (dict(mask=AttentionMask(allowed_BNTS=jnp.ones((1, 1, 1, 1), bool))), "explicit array"),
        (dict(mask=AttentionMask(q_positions_BT=jnp.ones((1, 128), int))), "given positions"),
        (dict(dropping=True), "model.attention_dropout=0"),
        (dict(shards=2), "the mesh splits the sequence into 2"),
    ],
)
def test_what_they_cannot_serve(case: dict, word: str) -> None:
    (reason,) = found(**case)
    assert word in reason
