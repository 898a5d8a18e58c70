"""Benchmark `convergence` at a tiny size: it compares like with like, and what learns otherwise is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bertgpt_jax.benchmarks import convergence, convergence_cases
from bertgpt_jax.benchmarks.convergence_cases import CASES, Technique, techniques, unpacked
from bertgpt_jax.errors import DataError
from bertgpt_jax.parallel import replicas

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

SMALL = (
    "model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", "model.intermediate_size=64",
    "model.max_positions=32", "stages.0.sequence_length=32", "stages.0.batch_size=12",
)  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> convergence.Settings:
    """A small GPT on speeches of a few words."""
    monkeypatch.setitem(CASES, "gpt", CASES["gpt"]._replace(changes=SMALL))
    monkeypatch.setattr(replicas, "SMALL", 0)
    rng, words = np.random.default_rng(0), "the cat sat on mats while some dogs ran after every bird".split()
    speeches = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(600)]
    (tmp_path / "text.txt").write_text("\n\n".join(speeches))
    return convergence.Settings(
        gpt_text=str(tmp_path / "text.txt"), bert_text=str(tmp_path), models=("gpt",), seeds=2, steps=30, gpt_steps=20,
        eval_batches=2, techniques=("packed", "ZeRO", "bf16"), kept=str(tmp_path / "kept.json"),
        picture=str(tmp_path / "curves.png"),
    )  # fmt: skip


def test_losses_beside_plain_ones_and_what_is_kept_of_them(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    result = convergence.run(settings)
    facts = result.facts["gpt"]
    assert set(facts) == {"packed rows of 2", "ZeRO-1 on 2 devices", "bf16", "moments in bf16"}
    for name, found in facts.items():
        assert found["steps"] == (30 if name == "bf16" else 20)
        assert 0 < found["spread"] and 0 < found["bar"] <= found["spread"]
        assert len(found["plain"]) == len(found["technique"]) == len(found["seeds_apart"]) == 2
        assert found["apart"] < 0.5, "none of them learns otherwise"
        for seed in (*found["plain"], *found["technique"]):
            assert len(seed["losses"]) == found["steps"] // 10 and seed["losses"][-1] < seed["losses"][0], "it learns"
    for name in ("packed rows of 2", "ZeRO-1 on 2 devices"):
        assert facts[name]["apart"] < 0.01, "the same examples, from the same start"
    assert [row.detail for row in result.rows] == [True, True, False, False, False], "and one row for the exact ones"
    assert result.rows[-1].value == max(row.value for row in result.rows[:2])
    assert Path(settings.picture).stat().st_size > 1000
    monkeypatch.setattr(convergence.Trainer, "_compiled", lambda *_: pytest.fail("kept runs are not made again"))
    assert json.loads(json.dumps(convergence.run(settings).facts)) == json.loads(json.dumps(result.facts))


def test_another_rate_misses_the_bar(settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the rate moves the loss by less than seeds do here, and by more than roundings could."""
    faster = Technique("twice the rate", ("stages.0.schedule.peak=8e-3",))
    monkeypatch.setattr(convergence, "techniques", lambda kind: (faster,))
    only = convergence.Settings(**settings.model_dump() | {"techniques": (), "picture": "", "gpt_steps": 10})
    row = convergence.run(only).rows[0]
    assert not row.met and row.value > 1 and row.most <= convergence_cases.EXACT


def test_every_technique_is_named_once() -> None:
    for kind in ("gpt", "bert"):
        names = [t.name for t in techniques(kind)]
        assert len(names) == len(set(names)) >= 16


def test_a_text_that_is_not_there() -> None:
    with pytest.raises(DataError, match="no_such_text"):
        convergence.run(convergence.Settings(gpt_text="no_such_text", models=("gpt",)))


def test_segments_in_rows_of_their_own() -> None:
    packed = {
        "tokens": np.array([[5, 6, 7, 8, 9, 0], [4, 3, 0, 0, 0, 0]]),
        "segments": np.array([[1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0]]),
        "positions": np.array([[0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3]]),
        "mask_positions": np.array([[3, 1, 4], [0, 0, 0]]),
        "mask_labels": np.array([[18, 16, 19], [14, 0, 0]]),
        "mask_weights": np.array([[1, 1, 1], [1, 0, 0]], np.float32),
        "next_labels": np.array([[1, 0], [1, 0]]),
        "next_weights": np.array([[1, 1], [1, 0]], np.float32),
        "cls_positions": np.array([[0, 2], [0, 0]]),
    }
    apart = unpacked(packed, 2)
    np.testing.assert_array_equal(apart["tokens"][:, :3], [[5, 6, 0], [7, 8, 9], [4, 3, 0], [0, 0, 0]])
    np.testing.assert_array_equal(apart["segments"].sum(1), [2, 3, 2, 0])
    np.testing.assert_array_equal(apart["positions"][:2, :3], [[0, 1, 0], [0, 1, 2]])
    np.testing.assert_array_equal(apart["mask_positions"], [[1, 0, 0], [1, 2, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(apart["mask_labels"], [[16, 0, 0], [18, 19, 0], [14, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(apart["mask_weights"].sum(1), [1, 2, 1, 0])
    np.testing.assert_array_equal(apart["next_labels"], [1, 0, 1, 0])
    np.testing.assert_array_equal(apart["next_weights"], [1, 1, 1, 0])
