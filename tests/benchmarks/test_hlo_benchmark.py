"""Reading programs, and what must hold of steps compiled for TPUs."""

from __future__ import annotations

import importlib.util

import pytest

from bertgpt_jax.benchmarks import hlo, memory_ladder
from bertgpt_jax.benchmarks.memory_ladder import LADDERS
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.parallel import topology

needs_libtpu = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install 'bertgpt_jax[libtpu]'",
    ),
]

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
    program = hlo.parse(TEXT)
    assert set(program) == {"add", "fused", "body", "condition", "main"}
    assert hlo.in_loops(program) == {"body", "condition", "add"}
    assert [opcode for _, _, opcode, _ in program["main"]] == [
        "while",
        "fusion",
        "custom-call",
        "all-gather-start",
        "copy",
    ]


def test_arrays_in_memory_are_told_from_steps_of_a_fusion() -> None:
    large = [sizes for sizes in hlo.fp32_arrays(hlo.parse(TEXT)) if 64 * 128 in sizes]
    assert large == [[64 * 128]]  # %big; not %inner
    assert hlo.size("(f32[2,4]{1,0:T(8,128)}, bf16[3]{0}, pred[5]{0}, s32[])") == 32 + 6 + 5 + 4


def test_without_libtpu_there_is_one_line(monkeypatch) -> None:
    topology.describe.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"v5e:4x4 needs libtpu; run: pip install 'bertgpt_jax\[libtpu\]'"):
        topology.describe("v5e:4x4")


def test_ladders_set_what_they_say() -> None:
    for ladder in LADDERS.values():
        rungs = memory_ladder.rungs(ladder)
        for rung in rungs:
            config = memory_ladder.step_config(ladder, rung, 16)
            assert config.execution.compute.dtype == "bfloat16"
            scored = round(config.objective.scored_share(ladder.length) * ladder.length)
            assert scored == (ladder.length if rung.everywhere or ladder.kind == "gpt" else 20)
            assert scored % (config.execution.compute.head_chunk or scored) == 0
        assert [rung.naive for rung in rungs] == [True, True] + [False] * (len(rungs) - 2)


class TestTpu:
    pytestmark = needs_libtpu

    def test_steps_hold_what_they_must(self) -> None:
        result = hlo.run(hlo.Settings(models=("gpt",)))
        assert not [row for row in result.rows if not row.met]
        assert result.facts["gpt"]["reduce_scatters"] > 0

    @pytest.mark.slow
    @pytest.mark.parametrize(("model", "place"), [("bert", "v5e:4x4"), ("gpt", "v6e:16x16")])
    def test_steps_hold_what_they_must_elsewhere(self, model: str, place: str) -> None:
        assert not [row for row in hlo.run(hlo.Settings(models=(model,), topology=place)).rows if not row.met]
