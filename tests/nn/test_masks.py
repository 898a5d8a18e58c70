"""Attention masks against matrices written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bertgpt_jax.nn.masks import AttentionMask, causal_mask, segment_mask


def matrix(mask: AttentionMask, q_length: int, kv_length: int | None = None) -> list[str]:
    """Row 0 of a mask as one string of 0 and 1 a query."""
    array = np.asarray(mask.to_array(q_length, kv_length or q_length))
    assert array.ndim == 4 and array.dtype == bool
    return ["".join("01"[int(x)] for x in row) for row in array[0, 0]]


def test_causal() -> None:
    assert matrix(causal_mask(), 4) == ["1000", "1100", "1110", "1111"]


def test_causal_window_keeps_the_last_keys() -> None:
    assert matrix(AttentionMask(causal=True, window=2), 4) == ["1000", "1100", "0110", "0011"]


def test_window_without_causal_reaches_both_ways() -> None:
    assert matrix(AttentionMask(window=2), 4) == ["1100", "1110", "0111", "0011"]


def test_prefix_is_visible_to_earlier_queries() -> None:
    assert matrix(AttentionMask(causal=True, prefix_B=np.array([2])), 4) == ["1100", "1100", "1110", "1111"]


def test_prefix_differs_by_row() -> None:
    array = np.asarray(AttentionMask(causal=True, prefix_B=np.array([0, 3])).to_array(3, 3))
    assert array[0, 0].astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert array[1, 0].all()


def test_segments_attend_within_themselves_and_padding_to_padding() -> None:
    assert matrix(segment_mask(np.array([[1, 1, 2, 0, 0]])), 5) == ["11000", "11000", "00100", "00011", "00011"]


def test_positions_replace_indices() -> None:
    """Keys in another order than their positions, as in a ring of cached keys."""
    mask = AttentionMask(causal=True, q_positions_BT=np.array([[4, 5]]), kv_positions_BS=np.array([[4, 5, 2, 3]]))
    assert matrix(mask, 2, 4) == ["1011", "1111"]


def test_fewer_queries_than_keys_count_from_the_front() -> None:
    assert matrix(causal_mask(), 2, 4) == ["1000", "1100"]


def test_all_parts_must_allow() -> None:
    allowed = np.ones((1, 1, 4, 4), bool)
    allowed[..., 3, 2] = False
    segments = np.array([[1, 1, 1, 1]])
    segments[0, 0] = 2
    mask = AttentionMask(q_segments_BT=segments, kv_segments_BS=segments, allowed_BNTS=allowed, causal=True, window=3)
    assert matrix(mask, 4) == ["1000", "0100", "0110", "0101"]


def test_nothing_forbidden_needs_no_array() -> None:
    assert AttentionMask().to_array(3, 3) is None


@pytest.mark.parametrize("heads", [1, 3])
def test_explicit_mask_may_differ_by_head(heads: int) -> None:
    allowed = np.random.default_rng(0).random((2, heads, 4, 5)) < 0.5
    assert np.array_equal(AttentionMask(allowed_BNTS=allowed).to_array(4, 5), allowed)
