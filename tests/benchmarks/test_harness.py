"""The harness: sides take turns, medians and ratios are what they say, records become table rows."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from bertgpt_jax.benchmarks import harness, record
from bertgpt_jax.benchmarks.harness import Result, Row, Side, Watch, compare
from bertgpt_jax.commands.benchmark import read_results
from bertgpt_jax.errors import ConfigError, DataError


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
    found = record.document("x", {}, Result((), {"main": found}), quiet())
    assert found["load"]["drifting"] == ["main: ours"]


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


def fake_record(**more: Any) -> dict[str, Any]:
    rows = (
        Row("a speed", 2.125, "x", least=2.0),
        Row("a rate", 5.5e6, "tokens/s", least=1e7),
        Row("time", 0.5, "s", detail=True),
        Row("errors", 0.0, "", most=0.0),
    )
    result = Result(rows, {"a": {"seconds": {"ours": {"drift": 0.3}, "peer": {"drift": 0.0}}}}, {"eager": 2.3}, {})
    return json.loads(json.dumps(record.document("fake", {"rows": 4}, result, quiet()))) | more


def test_a_record_names_no_host_and_becomes_table_rows():
    found = fake_record()
    assert found["ratios"] == {"eager": 2.3} and found["settings"] == {"rows": 4} and found["malloc"] == "system"
    assert found["versions"]["numpy"] and found["hardware"]["cpus"] >= 1
    text = json.dumps(found)
    assert record.platform.node() not in text or not record.platform.node()
    assert "/home" not in text and "/root" not in text
    lines = record.table([found]).splitlines()
    assert len(lines) == 6
    assert "| a speed | 2.12x | >= 2x |" in lines[2]
    assert "| a rate | 5.5M tokens/s | >= 10M tokens/s (missed) |" in lines[3]
    assert "| errors | 0 | <= 0 |" in lines[5]


def test_a_table_says_what_else_happened():
    (line,) = record.table([fake_record()]).splitlines()[2:3]
    assert "times moved while measuring (1 of 2 sides)" in line and "malloc" not in line and "disturbed" not in line
    disturbed = record.document(
        "fake", {}, Result((Row("a", 1.0, "x"),), {}, failures=("b differs",)), quiet(0.4), "kept"
    )
    said = record.table([disturbed])
    assert disturbed["loaded"] and "**disturbed**, others took 40%" in said
    assert "malloc kept freed memory" in said and "**failed**: b differs" in said


def test_the_readme_gets_the_rows_between_its_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{record.BEGIN}\nold\n{record.END}\nafter\n")
    compiled = fake_record(benchmark="other", settings={"topology": "v5e:4x4"}, malloc="kept")
    record.into_readme(path, [fake_record(), compiled])
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith(f"{record.END}\nafter\n") and "old" not in text
    assert "| `fake` | a speed | 2.12x | >= 2x |" in text and "| time |" not in text, "details stay in the JSON"
    assert "- `other`: compiled for v5e:4x4, which was not there, jax " in text
    assert "- `fake`: times moved while measuring (1 of 2 sides)." in text and "- `other`: malloc kept" in text
    stamp = path.stat().st_mtime_ns
    record.into_readme(path, [fake_record(), compiled])
    assert path.stat().st_mtime_ns == stamp, "nothing to write"


@pytest.mark.parametrize(
    "text", ["none", f"{record.BEGIN}", f"{record.END}{record.BEGIN}", f"{record.BEGIN * 2}{record.END}"]
)
def test_a_readme_without_its_markers(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(DataError, match="README.md: it must have the lines"):
        record.into_readme(tmp_path / "README.md", [fake_record()])
    assert (tmp_path / "README.md").read_text() == text


def test_the_readme_has_what_the_records_say(repository):
    """Else: tools/benchmark.py --table --readme README.md"""
    found = read_results([], repository / "docs" / "results")
    written = record.readme_parts(repository / "README.md")[1]
    assert written.strip() == record.block(found)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(2.125, "x", "2.12x"), (4307.2, "MiB", "4,307 MiB"), (12345.0, "MiB", "12,345 MiB"), (0.0, "", "0"),
     (5.5e6, "tokens/s", "5.5M tokens/s"), (0.45, "s", "0.45 s")],
)  # fmt: skip
def test_values_are_shown_in_three_digits(value, unit, text):
    assert record.shown(value, unit) == text


def test_a_missing_peer_is_one_line_naming_the_extra():
    with pytest.raises(ConfigError, match=r"the peer needs no_such_module; run: pip install 'bertgpt_jax\[parity\]'"):
        harness.require("json", "no_such_module", extra="parity", purpose="the peer")
