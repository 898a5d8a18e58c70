"""The harness: sides take turns, medians and ratios are what they say, records become table rows."""

from __future__ import annotations

import json
import time

import pytest

from bertgpt_jax.benchmarks import harness
from bertgpt_jax.benchmarks.harness import Result, Row, Side, Watch, compare
from bertgpt_jax.errors import ConfigError


def sleeper(name: str, seconds: float, log: list[str]) -> Side:
    def step(state: str) -> None:
        log.append(state)
        time.sleep(seconds)

    return Side(name, lambda: f"{name} state", step)


def test_sides_take_turns_and_ratios_are_peers_over_ours():
    log: list[str] = []
    found = compare([sleeper("ours", 0.01, log), sleeper("peer", 0.04, log)], repeats=3, warmup=1)
    assert log == ["ours state", "peer state"] * 4
    assert 2 < found["ratios"]["peer"] < 6 and 2 < found["paired"]["peer"]["median"] < 6
    seconds = found["seconds"]["ours"]
    assert 0.01 <= seconds["min"] <= seconds["p10"] <= seconds["median"] <= seconds["p90"] < 0.04
    assert harness.rate(found, "peer", 8) == pytest.approx(8 / found["seconds"]["peer"]["median"])


def test_drift_is_the_second_half_over_the_first():
    durations = iter([0.005, 0.005, 0.02, 0.02])
    found = compare([Side("ours", lambda: None, lambda _: time.sleep(next(durations)))], repeats=4, warmup=0)
    assert found["seconds"]["ours"]["drift"] > 1
    record = harness.document("x", {}, Result((), {"main": found}), quiet())
    assert record["load"]["drifting"] == ["main: ours"]


def quiet(others: float = 0.0) -> Watch:
    return Watch(others=others, stolen=0.0)


def test_own_work_is_not_somebody_elses(monkeypatch):
    monkeypatch.setattr(harness.psutil, "cpu_count", lambda: 2)
    # wall, busy, stolen, own: 10 s on two cores, 12 busy of which 11 are ours, 0.4 stolen
    readings = iter([(100.0, 50.0, 1.0, 30.0), (110.0, 62.0, 1.4, 41.0)])
    monkeypatch.setattr(harness, "_cpu_seconds", lambda: next(readings))
    with Watch() as watch:
        pass
    assert watch.others == pytest.approx(1 / 20) and watch.stolen == pytest.approx(0.4 / 20)
    assert not watch.loaded and quiet(0.5).loaded


def test_the_clocks_of_the_machine_are_read():
    with Watch() as watch:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
    assert 0 <= watch.others <= 1 and 0 <= watch.stolen <= 1
    before, after = watch._begun, harness._cpu_seconds()
    assert after[3] - before[3] >= 0.15 and after[0] - before[0] >= 0.15  # they tick every 10 ms


def test_a_record_names_no_host_and_becomes_table_rows():
    rows = (Row("a speed", 2.125, "x", least=2.0), Row("a rate", 5.5e6, "tokens/s", least=1e7), Row("time", 0.5, "s"))
    record = harness.document("fake", {"rows": 4}, Result(rows, {}, {"eager": 2.3}, {"loss": 1.0}), quiet())
    record = json.loads(json.dumps(record))
    assert record["ratios"] == {"eager": 2.3} and record["settings"] == {"rows": 4}
    assert record["versions"]["numpy"] and record["hardware"]["cpus"] >= 1
    text = json.dumps(record)
    assert harness.platform.node() not in text or not harness.platform.node()
    assert "/home" not in text and "/root" not in text
    lines = harness.table([record]).splitlines()
    assert len(lines) == 5
    assert "| a speed | 2.12x | >= 2x |" in lines[2]
    assert "| a rate | 5.5M tokens/s | >= 10M tokens/s (missed) |" in lines[3]
    disturbed = harness.document("fake", {}, Result(rows, {}), quiet(0.4))
    assert disturbed["loaded"] and "**disturbed**" in harness.table([disturbed])


def test_a_missing_peer_is_one_line_naming_the_extra():
    with pytest.raises(ConfigError, match=r"the peer needs no_such_module; run: pip install 'bertgpt_jax\[parity\]'"):
        harness.require("json", "no_such_module", extra="parity", purpose="the peer")
