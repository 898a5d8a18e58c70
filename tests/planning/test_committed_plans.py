"""The plans in docs/results: all that are asked for, compiled, and what the search found for 175B."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bertgpt_jax.commands.plan import _labels
from bertgpt_jax.planning import places, report

ASKED = {
    ("gpt3/175b", "v5p:8x8x16", 1),
    ("gpt3/175b", "v5p:8x8x16", 2),
    ("gpt3/13b", "v5e:16x16", 1),
    ("gpt3/13b", places.parse("v5p-512").name, 1),
    ("gpt3/6_7b", "v6e:16x16", 1),
    ("gpt3/1_3b", "v5e:16x16", 1),
    ("bert/base", places.parse("v4-32").name, 1),
    ("roberta/base", places.parse("v4-32").name, 1),
    ("bert/large_pod", "v4:8x8x8", 1),
    ("bert/large_pod", "v5e:16x16", 1),
    ("gpt/gpt2_xl", "v5e:4x4", 1),
}


@pytest.fixture(scope="module")
def plans() -> list[dict[str, Any]]:
    return json.loads((Path(__file__).parents[2] / "docs" / "results" / "plans.json").read_text())


def test_all_are_there_and_were_compiled(plans: list[dict[str, Any]]) -> None:
    assert {(tree["config"], tree["topology"], tree["slices"]) for tree in plans} >= ASKED
    for tree in plans:
        for stage in tree["stages"]:
            assert stage["compile_seconds"] > 0, (tree["config"], tree["topology"])
            assert stage["fits"] == (stage["bytes_per_device"] <= tree["hbm_bytes"])


def test_the_search_found_a_fast_layout_for_175b(plans: list[dict[str, Any]]) -> None:
    (found,) = [tree for tree in plans if "ranking" in tree]
    assert (found["config"], found["chips"], found["fits"]) == ("gpt3/175b", 1024, True)
    assert found["predicted_mfu"] >= 0.60 and found["binding"]
    times = [one["seconds"] for one in found["ranking"]]
    assert times == sorted(times) and len(times) == 10


def test_each_has_a_bar_of_its_own(plans: list[dict[str, Any]]) -> None:
    labels = _labels(plans)
    assert len(set(labels)) == len(plans)
    assert "gpt3/175b, 1,024 v5p:8x8x16, fsdp=512,tensor=2" in labels and "gpt3/1_3b, 256 v5e:16x16" in labels


def test_the_table_is_that_of_the_plans(plans: list[dict[str, Any]]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "results" / "plans.md").read_text()
    table = report.markdown([(f"{tree['config']} {' '.join(tree['overrides'])}".strip(), tree) for tree in plans])
    assert table in text
