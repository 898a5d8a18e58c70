"""Reading programs, and what must hold of steps compiled for TPUs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from bertgpt_jax.benchmarks import harness, hlo, memory_ladder
from bertgpt_jax.benchmarks.memory_ladder import LADDERS
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.parallel import replicas, topology

LADDER_RECORD = "docs/results/memory_ladder.json"
REGRESSION = 1.05
"""How much more memory a rung may take than its record says."""

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


def regressions(found: dict[str, int], record: dict[str, Any], ladder: str) -> list[str]:
    """A sentence for each rung that takes over `REGRESSION` times what the record has for it."""
    if ladder not in record["facts"]:
        return [f"{LADDER_RECORD} has no ladder '{ladder}'"]
    before, wrong = record["facts"][ladder]["bytes"], []
    for rung, size in found.items():
        if rung not in before:
            wrong.append(f"{ladder}: {rung}: {size:,} bytes, and {LADDER_RECORD} does not know the rung")
        elif size > REGRESSION * before[rung]:
            wrong.append(f"{ladder}: {rung}: {size:,} bytes, {size / before[rung]:.3f}x the {before[rung]:,} on record")
    hint = (
        f"the record is of libtpu {record['versions'].get('libtpu')}; where more memory is meant, renew it: "
        f"tools/benchmark.py memory_ladder --json {LADDER_RECORD}"
    )
    return [f"{line} ({hint})" for line in wrong]


def test_a_rung_that_takes_more_memory_is_named_with_both_numbers() -> None:
    record = {"facts": {"small": {"bytes": {"a": 1000, "b": 2000}}}, "versions": {"libtpu": "1.2"}}
    assert regressions({"a": 1050, "b": 500}, record, "small") == []
    (line,) = regressions({"a": 1000, "b": 2101}, record, "small")
    assert all(word in line for word in ("small: b: 2,101 bytes", "1.05", "2,000 on record", "libtpu 1.2", "renew it"))
    assert "does not know the rung" in regressions({"c": 1}, record, "small")[0]
    assert "no ladder 'gpt'" in regressions({}, record, "gpt")[0]


def test_the_record_has_every_rung_and_meets_every_bar(repository: Path) -> None:
    record = json.loads((repository / LADDER_RECORD).read_text("utf-8"))
    assert record["settings"]["topology"] == memory_ladder.Settings().topology and not record["loaded"]
    for name, ladder in LADDERS.items():
        assert list(record["facts"][name]["bytes"]) == [rung.name for rung in memory_ladder.rungs(ladder)]
    rows = [harness.Row(**tree) for tree in record["rows"]]
    assert [row.measure for row in rows if not row.met] == []


class TestTpu:
    pytestmark = needs_libtpu

    def test_steps_hold_what_they_must(self) -> None:
        result = hlo.run(hlo.Settings(models=("gpt",), topologies=("v5e:4x4",)))
        assert not [row for row in result.rows if not row.met]
        assert all(facts["reduce_scatters"] > 0 for facts in result.facts.values())

    @pytest.mark.slow
    @pytest.mark.parametrize(("model", "place"), [("bert", "v5e:4x4"), ("gpt", "v6e:16x16"), ("bert", "v6e:16x16")])
    def test_steps_hold_what_they_must_elsewhere(self, model: str, place: str) -> None:
        assert not [row for row in hlo.run(hlo.Settings(models=(model,), topologies=(place,))).rows if not row.met]

    @pytest.mark.slow
    def test_gradients_summed_whole_are_seen(self, monkeypatch) -> None:
        """As they are where replicas that form a torus are taken for a line."""
        monkeypatch.setattr(replicas, "_links", lambda mesh: replicas.Links((mesh.shape["data"],)))
        settings = hlo.Settings(models=("gpt",), topologies=("v5e:4x4",))
        assert hlo.examine(settings, "gpt", "v5e:4x4")["share_summed_whole"] > 0.5

    @pytest.mark.timeout(1200)
    @pytest.mark.parametrize(
        "ladder", ["small", pytest.param("bert", marks=pytest.mark.long), pytest.param("gpt", marks=pytest.mark.long)]
    )
    def test_no_step_takes_more_memory_than_it_did(self, ladder: str, repository: Path) -> None:
        result = memory_ladder.run(memory_ladder.Settings(ladders=(ladder,)))
        assert [f"{row.measure}: {row.value:.3f} > {row.most}" for row in result.rows if not row.met] == []
        record = json.loads((repository / LADDER_RECORD).read_text("utf-8"))
        assert regressions(result.facts[ladder]["bytes"], record, ladder) == []
