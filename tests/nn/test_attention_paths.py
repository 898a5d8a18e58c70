"""Which attention path is taken, and that a wanted one that cannot serve is refused with all its reasons."""

from __future__ import annotations

import logging
import re

import jax
import jax.numpy as jnp
import pytest

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn import attention
from bertgpt_jax.nn.attention import AttentionCase, PathChoice, choose_form, choose_path, dot_product_attention
from bertgpt_jax.nn.masks import AttentionMask, causal_mask, segment_mask
from bertgpt_jax.planning.gpu import stand_in
from bertgpt_jax.planning.places import parse

SHAPE = (2, 128, 4, 64)
SEGMENTS = jnp.ones((2, 128), jnp.int32)


def choose(wanted: str, platform: str, mask: AttentionMask, dtype: str = "bfloat16", dropping: bool = False) -> str:
    return choose_path(PathChoice(wanted, platform), AttentionCase(SHAPE, 128, jnp.dtype(dtype), mask, dropping))


@pytest.mark.parametrize(
    ("platform", "mask", "dtype", "dropping", "path"),
    [
        ("cpu", causal_mask(), "float32", False, "reference"),
        ("tpu", causal_mask(), "float32", False, "splash"),
        ("tpu", segment_mask(SEGMENTS), "bfloat16", False, "splash"),
        ("tpu", causal_mask(), "bfloat16", True, "reference"),
        ("gpu", causal_mask(), "bfloat16", False, "cudnn"),
        ("gpu", causal_mask(), "float32", False, "reference"),
        ("gpu", segment_mask(SEGMENTS, packed=False), "bfloat16", False, "cudnn"),
        ("gpu", segment_mask(SEGMENTS), "bfloat16", False, "reference"),
        ("gpu", AttentionMask(window=8), "bfloat16", False, "reference"),
        ("gpu", AttentionMask(causal=True, window=8), "bfloat16", False, "cudnn"),
    ],
)
def test_auto(platform: str, mask: AttentionMask, dtype: str, dropping: bool, path: str) -> None:
    assert choose("auto", platform, mask, dtype, dropping) == path
    assert choose("reference", platform, mask, dtype, dropping) == "reference"


def test_auto_takes_packed_rows_to_cudnn_where_it_can() -> None:
    """From Hopper on, and with a known number of segments."""
    known, unknown = segment_mask(SEGMENTS, max_segments=4), causal_mask(SEGMENTS)
    with stand_in(parse("h200:8")):
        assert [choose("auto", "gpu", mask) for mask in (known, unknown)] == ["cudnn", "reference"]
    with stand_in(parse("a100:8")):
        assert choose("auto", "gpu", known) == "reference"


@pytest.mark.parametrize(
    ("platform", "dtype", "why"),
    [
        ("gpu", "float32", "reference, as cudnn cannot serve: dtype float32 is none of bfloat16, float16 "
         "(set execution.compute.dtype=bfloat16)"),
        ("gpu", "bfloat16", "cudnn, the kernel of gpu serves"),
        ("tpu", "float32", "splash, the kernel of tpu serves"),
        ("cpu", "float32", "reference, the path of cpu"),
    ],
)  # fmt: skip
def test_auto_says_once_what_and_why(
    platform: str, dtype: str, why: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, which may drop probabilities, speaks first; evaluation of the same shape adds no line."""
    monkeypatch.setattr(attention, "_said", set())
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            choose("auto", platform, causal_mask(), dtype)
        choose("auto", platform, causal_mask(), dtype, dropping=True)
        choose("reference", platform, causal_mask(), dtype)
    assert caplog.messages == [f"attention (128 x 128, 4 heads of 64, {dtype}): {why}"]


@pytest.mark.parametrize(
    ("platform", "dropping", "why"),
    [
        ("cpu", False, "ring, the path of cpu"),
        ("cpu", True, "reference, the path of cpu; keys and values are gathered, as a ring cannot serve: it has no "
         "dropout of attention probabilities (set model.attention_dropout=0)"),
        ("tpu", False, "splash, the kernel of tpu serves"),
    ],
)  # fmt: skip
def test_auto_says_one_line_of_a_split_sequence(
    platform: str, dropping: bool, why: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_said", set())
    with caplog.at_level(logging.INFO):
        case = AttentionCase((2, 512, 4, 64), 512, jnp.dtype("float32"), causal_mask(), dropping, 2)
        attention.choose(PathChoice("auto", platform), case)
    assert caplog.messages == [f"attention (512 x 512 in 2 shards, 4 heads of 64, float32): {why}"]


@pytest.mark.parametrize(
    ("wanted", "platform", "words"),
    [
        ("splash", "cpu", ["it runs on tpu, not on cpu", "no dropout"]),
        ("cudnn", "tpu", ["it runs on gpu, not on tpu", "several segments", "no public dropout"]),
        ("cudnn", "gpu", ["several segments", "how many at most is not known", "no public dropout"]),
        ("tokamax", "cpu", ["several segments", "no dropout"]),
    ],
)
def test_a_wanted_path_that_cannot_serve(wanted: str, platform: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(wanted, platform, segment_mask(SEGMENTS), dropping=True)
    assert all(word in str(caught.value) for word in (f"'{wanted}' cannot serve 128 x 128", *words))


@pytest.mark.parametrize(
    ("platform", "mask", "dropping", "form"),
    [
        ("cpu", causal_mask(), False, "ring"),
        ("cpu", segment_mask(SEGMENTS, packed=False), False, "ring"),
        ("cpu", causal_mask(), True, "all_gather"),
        ("cpu", AttentionMask(prefix_B=jnp.ones(2, jnp.int32), causal=True), False, "all_gather"),
        ("gpu", causal_mask(), False, "ring"),
        ("tpu", causal_mask(SEGMENTS), False, "all_gather"),
        ("tpu", causal_mask(), True, "all_gather"),
    ],
)
def test_form_over_a_split_sequence(platform: str, mask: AttentionMask, dropping: bool, form: str) -> None:
    case = AttentionCase((2, 512, 4, 64), 512, jnp.dtype("bfloat16"), mask, dropping, 2)
    assert choose_form(PathChoice("auto", platform), case) == form
    assert choose_form(PathChoice("auto", platform, "all_gather"), case) == "all_gather"


@pytest.mark.parametrize("wanted", ["splash", "cudnn"])
def test_a_ring_and_a_kernel_exclude_each_other(wanted: str) -> None:
    with pytest.raises(ConfigError, match=rf"'ring' cannot serve .*attention = '{wanted}'.*; use auto or all_gather"):
        case = AttentionCase((2, 512, 4, 64), 512, jnp.dtype("bfloat16"), causal_mask(), shards=2)
        choose_form(PathChoice(wanted, "tpu", "ring"), case)


@pytest.mark.parametrize(
    ("mask", "width"),
    [
        (causal_mask(), 64),
        (causal_mask(), 128),
        (AttentionMask(causal=True, window=8), 64),
        (segment_mask(SEGMENTS, packed=False), 64),
    ],
)
def test_cudnn_is_in_the_program_for_a_gpu(mask: AttentionMask, width: int) -> None:
    """Lowered for CUDA without one: a fused forward and a fused backward, no softmax by XLA."""
    x = jax.ShapeDtypeStruct((2, 128, 4, width), jnp.bfloat16)
    choice = PathChoice("cudnn", "gpu")

    def loss(q, k, v):
        return jnp.sum(dot_product_attention(q, k, v, mask, choice=choice).astype(jnp.float32))

    with stand_in(parse("h200:1")):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(__cudnn\$fmha\w+)", text)
    assert sorted(calls) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"], calls
    assert "stablehlo.exponential" not in text
