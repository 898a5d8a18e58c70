"""`tools/benchmark.py`: names, settings, refusal, records and the table."""

from __future__ import annotations

import json
import sys
import types

import pytest

from bertgpt_jax.benchmarks import harness
from bertgpt_jax.commands import benchmark
from bertgpt_jax.commands.benchmark import main
from bertgpt_jax.config import Config


class FakeSettings(Config):
    rounds: int = 2


@pytest.fixture
def fake(monkeypatch):
    """A benchmark of nothing, by the name `fake`."""

    def run(settings: FakeSettings) -> harness.Result:
        side = harness.Side("ours", lambda: None, lambda _: None)
        return harness.Result((harness.Row("nothing", 3.0, "x", least=2.0),), {"a": harness.compare([side], 2)})

    module = types.SimpleNamespace(Settings=FakeSettings, run=run)
    monkeypatch.setitem(sys.modules, "bertgpt_jax.benchmarks.fake", module)
    monkeypatch.setitem(benchmark.BENCHMARKS, "fake", "nothing")


def surroundings(monkeypatch, others: float) -> None:
    monkeypatch.setattr(harness, "look_around", lambda: harness.Watch(others=others))


def test_a_run_is_written_and_read_back_as_a_table(fake, monkeypatch, tmp_path, capsys):
    surroundings(monkeypatch, 0.0)
    out = tmp_path / "results" / "fake.json"
    assert main(["fake", "rounds=3", "--json", str(out), "--cpus", "0"]) == 0
    assert "nothing" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["settings"] == {"rounds": 3} and record["comparisons"]["a"]["repeats"] == 2
    assert main(["--table", str(out)]) == 0
    assert "| `fake` | nothing | 3x | >= 2x |" in capsys.readouterr().out


def test_a_busy_machine_is_refused_unless_allowed(fake, monkeypatch, capsys):
    surroundings(monkeypatch, 0.8)
    assert main(["fake", "--cpus", "0"]) == 75
    assert "80%" in capsys.readouterr().err
    assert main(["fake", "--cpus", "0", "--allow-loaded"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["no_such"], 64, "no_such"),
        ([], 64, "known: data"),
        (["fake", "--cpus", "0", "round=3"], 78, "round"),
        (["fake", "--cpus", "0", "rounds=x"], 78, "rounds"),
    ],
)
def test_bad_arguments(fake, monkeypatch, capsys, arguments, code, words):
    surroundings(monkeypatch, 0.0)
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_files_that_are_no_results(tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"runs": {}}')
    assert main(["--table", str(tmp_path / "x.json")]) == 65
    assert "no result of a benchmark" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("{")
    assert main(["--table", str(tmp_path / "x.json")]) == 65
