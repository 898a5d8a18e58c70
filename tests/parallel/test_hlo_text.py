"""Reading programs as XLA prints them."""

from __future__ import annotations

import pytest

from bertgpt_jax.benchmarks.hlo import bytes_summed_whole, fp32_arrays
from bertgpt_jax.parallel.hlo_text import in_loops, parse, shape_bytes

TEXT = """\
HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %s = f32[] add(%a, %a)
}

%fused (p: bf16[64,128]) -> bf16[64,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  %inner = f32[64,128]{1,0} convert(%p)
  ROOT %r = bf16[64,128]{1,0:T(8,128)(2,1)} convert(%inner)
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %rs = f32[2,4]{1,0} all-reduce(%t), channel_id=1, to_apply=%add
  %splash_mha_fwd.1 = bf16[4,64]{1,0} custom-call(%t), custom_call_target="tpu_custom_call"
  ROOT %n = (s32[], f32[8]{0}) tuple(%t)
}

%condition (t: (s32[], f32[8])) -> pred[] {
  ROOT %c = pred[] constant(true)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%x), condition=%condition, body=%body
  %f = bf16[64,128]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %big = (f32[64,128]{1,0}, bf16[2]{0}) custom-call(%f), custom_call_target="x"
  %ag = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), channel_id=2
  ROOT %o = f32[8]{0} copy(%x)
}
"""


def test_a_program_is_read() -> None:
    program, entry = parse(TEXT)
    assert set(program) == {"add", "fused", "body", "condition", "main"} and entry == "main"
    assert in_loops(program) == {"body", "add"}
    opcodes = [line.opcode for line in program["main"]]
    assert opcodes == ["while", "fusion", "custom-call", "all-gather-start", "copy"]
    assert [line.collective for line in program["main"]] == [None, None, None, "all-gather", None]
    assert [line.name for line in program["body"]] == ["t", "rs", "splash_mha_fwd.1", "n"]


def test_arrays_in_memory_are_told_from_steps_of_a_fusion() -> None:
    large = [sizes for sizes in fp32_arrays(parse(TEXT)[0]) if 64 * 128 in sizes]
    assert large == [[64 * 128]], "%big; not %inner"
    assert shape_bytes("(f32[2,4]{1,0:T(8,128)}, bf16[3]{0}, pred[5]{0}, s32[])") == 32 + 6 + 5 + 4


SUMS = """\
%all-reduce-scatter (g: f32[64]) -> f32[4] {
  %g = f32[64]{0} parameter(0)
  %inner = f32[64]{0} all-reduce(%g), channel_id=1, to_apply=%add
  ROOT %part = f32[4]{0} dynamic-slice(%inner, %zero), dynamic_slice_sizes={4}
}

%update (i: s32[], z: f32[8], g: f32[1]) -> (f32[1], f32[8]) {
  %i = s32[] parameter(0)
  %z = f32[8]{0} parameter(1)
  %new = f32[1]{0} parameter(2)
  %laid = f32[8]{0} dynamic-update-slice(%z, %new, %i)
  ROOT %both = (f32[1]{0}, f32[8]{0}) tuple(%new, %laid)
}

ENTRY %main (x: f32[64]) -> f32[8] {
  %x = f32[64]{0} parameter(0)
  %scattered = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
  %zeros = f32[8]{0} broadcast(%zero), dimensions={}
  %there = f32[8]{0} dynamic-update-slice(%zeros, %x, %zero)
  %in_use = f32[8]{0} dynamic-update-slice(%x, %x, %zero)
  %fused = (f32[1]{0}, f32[8]{0}) fusion(%zero, %zeros, %x), kind=kLoop, calls=%update
  %first = f32[1]{0} get-tuple-element(%fused), index=0
  %second = f32[8]{0} get-tuple-element(%fused), index=1
  ROOT %sum = (OPERANDS) all-reduce(NAMES), channel_id=2, to_apply=%add
}
"""


@pytest.mark.parametrize(
    ("names", "shapes", "expected"),
    [
        (("x",), ("f32[64]{0}",), 256),
        (("there",), ("f32[8]{0}",), 0),
        (("second", "first"), ("f32[8]{0}", "f32[1]{0}"), 4),
        (("in_use", "there"), ("f32[8]{0}", "f32[8]{0}"), 32),
    ],
    ids=["a gradient", "parts laid into zeros", "laid by a fusion", "laid into an array in use"],
)
def test_sums_are_told_from_gathered_and_scattered_parts(names, shapes, expected) -> None:
    text = SUMS.replace("OPERANDS", ", ".join(shapes)).replace("NAMES", ", ".join(f"%{name}" for name in names))
    assert bytes_summed_whole(parse(text)[0]) == expected
