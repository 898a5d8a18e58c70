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
