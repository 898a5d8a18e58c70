"""The benchmarks of whole runs at tiny sizes: what they count, and that they say so when a side fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertgpt_jax.benchmarks import checkpoint, flops, nanogpt_peer, startup, time_to_loss
from bertgpt_jax.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

TINY = dict(layers=2, hidden=32, heads=2)


def test_compiled_arithmetic_is_that_of_the_formula() -> None:
    """Narrow models do more beside their matrix products; a layer left out or counted twice would be 20% and more."""
    small = flops.Settings(
        layers=3, hidden=192, heads=3, bert_vocabulary=2048, gpt_vocabulary=2048, bert_length=64, gpt_length=64,
        tokens=1024,
    )  # fmt: skip
    result = flops.run(small)
    assert [row.value for row in result.rows] == pytest.approx([1.05, 1.05], abs=0.06)
    assert result.facts["bert"]["analytic"] < result.facts["gpt"]["analytic"], "its head reads 15% of the positions"


def test_what_a_save_takes(tmp_path: Path) -> None:
    settings = checkpoint.Settings(**TINY, vocabulary=200, length=16, steps=2, rounds=2, directory=str(tmp_path))
    result = checkpoint.run(settings)
    facts = result.facts
    assert len(facts["rounds"]) == 2 and facts["state_bytes"] > 3 * 4 * 200 * 32
    assert facts["bytes_on_disk"] > 0.9 * facts["state_bytes"], "random bits do not compress"
    for found in facts["rounds"]:
        undisturbed = (found["before"] + found["after"]) / 2
        assert found["lost"] == pytest.approx(found["call"] + found["disturbed"] - undisturbed)
        assert found["call"] > 0
    assert set(result.comparisons["alone"]["seconds"]) == {"save", "write"}


@pytest.mark.slow
def test_starts_with_and_without_a_cache() -> None:
    settings = startup.Settings(**TINY, vocabulary=220, length=32, rows=8, rounds=1)
    result = startup.run(settings)
    assert set(result.facts["seconds"]) == {
        f"{loop}, {start}" for loop in ("scan", "unrolled") for start in ("cold", "warm")
    }
    assert all(0.5 < seconds[0] < settings.timeout for seconds in result.facts["seconds"].values())


def test_starts_are_paired_round_by_round() -> None:
    seconds = {"scan, cold": [10.0, 30.0, 20.0], "scan, warm": [5.0, 6.0, 8.0]}
    seconds |= {f"unrolled, {start}": [10.0, 10.0, 10.0] for start in ("cold", "warm")}
    result = startup._result(startup.Settings(), seconds)
    assert [row.value for row in result.rows] == [20.0, 6.0, 10.0, 10.0, pytest.approx(0.4), 1.0]
    spread = result.comparisons["scan"]["seconds"]["scan, cold"]
    assert 10 <= spread["p10"] < spread["median"] == 20 < spread["p90"] <= 30 and spread["min"] == 10


def test_a_start_that_fails_says_why() -> None:
    with pytest.raises(DataError, match="before its first step: error: stages.pretrain.batch_size 3 is not divisible"):
        startup.run(startup.Settings(**TINY, vocabulary=220, rows=3, rounds=1))


def text_of(directory: Path) -> str:
    rng = np.random.default_rng(0)
    words = "the cat sat on mats while some dogs ran after every bird they saw near old walls".split()
    (directory / "text.txt").write_text(" ".join(rng.choice(words, 6000)))
    return str(directory / "text.txt")


@pytest.mark.slow
@pytest.mark.parity
def test_seconds_to_a_loss_and_what_was_kept_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[parity]'")
    monkeypatch.delenv("XLA_FLAGS")  # one device, as the batch of 12 wants it
    kept = tmp_path / "kept.json"
    settings = time_to_loss.Settings(
        text=text_of(tmp_path), target=2.4, steps=200, eval_every=50, sides=("ours", "eager"), rounds=1, kept=str(kept)
    )
    result = time_to_loss.run(settings)
    (sides,) = result.facts["rounds"]
    assert set(result.ratios) == {"eager"} and set(sides) == {"ours", "eager"}
    for side in sides.values():
        assert side["curve"][-1][1] <= 2.4 and side["curve"][-1][0] == side["step"]
    assert abs(sides["ours"]["step"] - sides["eager"]["step"]) <= 50, "the same recipe learns alike"
    monkeypatch.setattr(time_to_loss, "_train", lambda *_: pytest.fail("kept sides are not trained again"))
    assert time_to_loss.run(settings).facts == json.loads(json.dumps(result.facts))
    for change in ({"target": 2.0}, {"rounds": 2}):
        with pytest.raises(pytest.fail.Exception):
            time_to_loss.run(time_to_loss.Settings(**settings.model_dump() | change))


def test_sides_take_turns_and_what_is_kept_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_to_loss, "require", lambda *_, **__: None)
    calls: list[str] = []
    seconds = {"ours": [10.0, 20.0, 12.0], "eager": [20.0, 22.0, 30.0]}

    def train(side: str, *_: Any) -> dict[str, Any]:
        calls.append(side)
        if len(calls) == 4:
            raise DataError("cut off")
        return {"seconds": seconds[side].pop(0), "step": 1, "curve": []}

    monkeypatch.setattr(time_to_loss, "_train", train)
    settings = time_to_loss.Settings(text=text_of(tmp_path), sides=("ours", "eager"), kept=str(tmp_path / "kept.json"))
    with pytest.raises(DataError, match="cut off"):
        time_to_loss.run(settings)
    result = time_to_loss.run(settings)
    assert calls == ["ours", "eager", "ours", "eager", "eager", "ours", "eager"]
    assert [row.value for row in result.rows] == [12.0, 22.0, pytest.approx(2.0)], "medians, and that of the pairs"
    found = result.comparisons["seconds to the loss"]
    assert found["seconds"]["eager"]["p10"] < 22 < found["seconds"]["eager"]["p90"]
    assert result.ratios == {"eager": pytest.approx(22 / 12)} and result.rows[2].least == 1.0
    assert len(result.facts["rounds"]) == 3


@pytest.mark.parity
def test_the_peer_evaluates_with_what_it_was_given_but_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[parity]'")
    seen: dict[str, list[int]] = {"compiled": [], "plain": []}

    def of(name: str):
        def loss(_: Any, x: Any, y: Any) -> Any:
            seen[name].append(len(x))
            return torch.tensor(float(len(x)))

        return loss

    ids = np.arange(10 * 4 + 1)
    found = nanogpt_peer.held_out_loss(of("compiled"), {}, ids, 4, rows=4, plain=of("plain"))
    assert seen == {"compiled": [4, 4], "plain": [2]} and found == pytest.approx((16 + 16 + 4) / 10)


def test_a_text_that_is_not_there() -> None:
    with pytest.raises(DataError, match="no_such_text"):
        time_to_loss.run(time_to_loss.Settings(text="no_such_text", sides=("ours",)))


def test_the_schedule_of_the_peer_is_ours() -> None:
    from bertgpt_jax.training.schedules import Cosine

    ours = Cosine(peak=4e-3, warmup_steps=10, final_fraction=0.02, total_steps=100)
    tree = ours.model_dump(mode="json")
    theirs = [nanogpt_peer.rate(tree, step, 100) for step in range(100)]
    np.testing.assert_allclose([float(ours(step)) for step in range(100)], theirs, rtol=2e-2, atol=5e-4)
