"""The analytic memory model beside XLA's own count: `golden/compiled.json` holds what `memory_analysis()` said.

Each of its points was compiled for TPUs by libtpu (jax 0.10.2): config, settings, place and mesh, stage, bytes a device
(arguments + temporaries + outputs that reuse no argument), and whether the model's factors were fitted to it: they
follow from those points alone.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bertgpt_jax.config import load_config
from bertgpt_jax.planning import places
from bertgpt_jax.planning.memory import Memory, layer_saved_bytes, saved_bytes
from bertgpt_jax.planning.plan import model_memory, parse_mesh, prepare
from bertgpt_jax.planning.work import Shards, Work, pipeline_parts, work_of
from bertgpt_jax.training.run_config import RunConfig

POINTS = json.loads((Path(__file__).parent / "golden" / "compiled.json").read_text())


def modelled(point: dict[str, Any]) -> Memory:
    config = load_config(point["config"], RunConfig, point["overrides"])
    place = places.parse(point["topology"], point["slices"])
    prepared = prepare(config, place, parse_mesh(point["mesh"]))
    stage = prepared.config.stages[point["stage"]]
    work = work_of(prepared.config, stage, place.chip.platform)
    return model_memory(prepared, stage, work, prepared.shards)


QUICK = {"gpt-dots", "175b-v5p"}
CASES = [
    pytest.param(point, id=point["name"], marks=() if point["name"] in QUICK else pytest.mark.long) for point in POINTS
]


@pytest.mark.parametrize("point", CASES)
def test_a_compiled_program(point: dict[str, Any]) -> None:
    found = modelled(point)
    assert found.total == pytest.approx(point["bytes"], rel=0.10), dataclasses.asdict(found)


def test_there_are_enough_and_some_were_never_looked_at() -> None:
    assert len(POINTS) >= 12 and sum(not point["fitted"] for point in POINTS) >= 4
    assert len({point["topology"] for point in POINTS}) >= 4
    assert {point["config"].partition("/")[0] for point in POINTS} >= {"roberta", "gpt", "gpt3"}


# ---------------------------------------------------------------- what follows from what

GPT = Work(layers=8, width=1024, heads=8, head_size=128, feed_forward=4096, vocabulary=8192, rows=32, length=1024)
FSDP = Shards(1, 4, 1, 1, 1)


def test_what_a_layer_leaves_for_its_backward_pass() -> None:
    """Bytes a position in bf16, counted by hand: all recomputed, its input; of `dots`, six products and the input."""
    kept = {remat: layer_saved_bytes(dataclasses.replace(GPT, remat=remat), FSDP) / 2 for remat in ("full", "dots")}
    assert kept == {"full": 1024, "dots": 2 * 1024 + 3 * 1024 + 4096}
    none, gelu = (layer_saved_bytes(dataclasses.replace(GPT, remat=r), FSDP) for r in ("none", "gelu"))
    assert none - gelu == 2 * 4096
    plain = dataclasses.replace(GPT, remat="none", fused_attention=False)
    assert layer_saved_bytes(plain, FSDP) - none == (4 + 4) * 1024 * 8
    narrow = dataclasses.replace(GPT, remat="dots", heads=16, head_size=64)
    assert layer_saved_bytes(narrow, FSDP) / 2 - kept["dots"] == 3 * 1024, "half of the lanes are empty"
    split = Shards(1, 1, 1, 1, 4)
    assert layer_saved_bytes(dataclasses.replace(GPT, remat="dots"), split) / 2 == 2 * 1024 + (3 * 1024 + 4096) / 4


def test_what_is_kept_falls_with_parts_and_stages() -> None:
    whole = saved_bytes(GPT, FSDP)
    assert saved_bytes(dataclasses.replace(GPT, microbatches=4), FSDP) == whole // 4
    assert saved_bytes(GPT, Shards(1, 2, 1, 2, 1)) == whole
    pipe = Shards(1, 2, 2, 1, 1)
    assert pipeline_parts(GPT, pipe) == 8
    assert saved_bytes(GPT, pipe) == pytest.approx(whole * 9 / 8), "half the layers of twice the rows, and a start"


def test_pipelines_take_as_many_parts_as_divide_the_rows() -> None:
    assert pipeline_parts(dataclasses.replace(GPT, rows=12), Shards(1, 1, 4, 1, 1)) == 12
    assert pipeline_parts(dataclasses.replace(GPT, rows=6), Shards(1, 1, 4, 1, 1)) == 0
    assert pipeline_parts(dataclasses.replace(GPT, pipeline_parts=4), Shards(1, 1, 4, 1, 1)) == 4
    assert pipeline_parts(GPT, FSDP) == 1
