"""Weak scaling on paper, tables of plans, and a plan compiled for TPUs where libtpu is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from bertgpt_jax.commands.plan import main
from bertgpt_jax.config import load_config
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.planning import places, scaling
from bertgpt_jax.training.run_config import RunConfig


def test_the_same_rows_a_chip() -> None:
    """A chip's computation stays, what it keeps of its speed is near all of it, and slices cost network time."""
    named = [places.parse("v5e:4x4"), places.parse("v5e:4x4", 4)]
    small, several = scaling.weak_scaling(load_config("gpt3/125m", RunConfig), named)
    assert [small.rows, several.rows] == [64, 256]
    assert small.time.matmul == pytest.approx(several.time.matmul, rel=1e-6)
    assert several.time.dcn > 0 == small.time.dcn
    assert 0.9 < several.mfu / small.mfu < 1.1


def test_rows_that_do_not_divide() -> None:
    named = [places.parse("v5e:1x1"), places.parse("v5e:16x16", 4)]
    with pytest.raises(ConfigError, match="no whole number of rows on 1; use a multiple of 1024"):
        scaling.weak_scaling(load_config("gpt3/125m", RunConfig), named)


def test_what_maxtext_published_is_beside_the_prediction() -> None:
    """The model knows no stragglers: it keeps all of the speed to 8,192 chips, of which MaxText kept 90%."""
    for name, points in scaling.published_scaling((1, 32)):
        one, many = points
        assert (one.chips, many.chips) == (256, 8192) and one.published and many.published
        assert 0.88 < many.published / one.published < 0.92, name
        assert many.mfu / one.mfu > many.published / one.published
        assert abs(many.mfu / many.published - 1) < 0.20


@pytest.mark.slow
def test_the_command(capsys) -> None:
    assert main(["bert/large_pod", "--weak-scaling", "v5e:16x16", "v5e:16x16*4"]) == 0
    shown = capsys.readouterr().out
    assert "| 1,024 | 4 x v5e:16x16 | 65,536 |" in shown and "54.7%" in shown


@pytest.mark.slow
def test_points_in_a_file(tmp_path: Path, capsys) -> None:
    out = tmp_path / "points.json"
    assert main(["gpt3/125m", "--weak-scaling", "v5e:4x4", "v6e:4x4", "--json", str(out)]) == 0
    tree = json.loads(out.read_text())
    assert [point["chips"] for point in tree["points"]] == [16, 16] and 0.1 < tree["calibration_error"] < 0.2
    assert "within 12% on published runs, none of them on v6e; numbers in" in capsys.readouterr().out


def test_places_of_the_command(capsys) -> None:
    assert main(["bert/large_pod", "--weak-scaling", "v5e:16x16*x"]) == 64
    assert "PLACE*SLICES" in capsys.readouterr().err
    assert main(["bert/large_pod", "--weak-scaling", "v5e:16x16", "--search"]) == 64
    assert "goes with --json alone" in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_of_plans(tmp_path: Path, capsys) -> None:
    files = [str(tmp_path / f"{i}.json") for i in range(2)]
    for file, topology in zip(files, ("v5e:16x16", "v4-128"), strict=True):
        assert main(["gpt3/1_3b", "--topology", topology, "--no-compile", "--json", file]) == 0
    (tmp_path / "all.json").write_text(json.dumps([json.loads(Path(file).read_text()) for file in files]))
    capsys.readouterr()
    assert main(["--table", str(tmp_path / "all.json"), "--png", str(tmp_path / "all.png")]) == 0
    head, line, first, second, _, error = capsys.readouterr().out.strip().split("\n")
    assert error == "times are within 12% on published runs"
    assert head.count("|") == line.count("|") == first.count("|") == second.count("|")
    assert "v5e:16x16 (256 chips)" in first and "v4:4x4x4 (64 chips)" in second and "fsdp 64" in second
    assert (tmp_path / "all.png").stat().st_size > 1000
    (tmp_path / "bad.json").write_text("{")
    assert main(["--table", str(tmp_path / "bad.json")]) == 64


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `libtpu`)")
def test_compiled_for_tpus(capsys) -> None:
    """A small GPT for eight v4 chips in two slices, without one: it fits, and only gradients cross between slices."""
    sizes = ["model.num_layers=2", "model.hidden_size=256", "model.num_heads=2", "model.intermediate_size=1024"]
    sizes += ["model.vocab_size=1024", "stages.0.batch_size=16", "stages.0.microbatches=1"]
    place = ["--topology", "v4:2x2x1", "--slices", "2", "--mesh", "data=2,fsdp=2,tensor=2", "--json"]
    assert main(["gpt/gpt2", *sizes, *place]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["chips"], tree["slices"], tree["fits"]) == (8, 2, True)
    assert tree["hbm_bytes"] == int(30.75 * 2**30) and tree["compile_seconds"] > 0
    kinds = {axis: {one["kind"] for one in tree["collectives"] if axis in one["axes"]} for axis in tree["mesh"]}
    assert kinds["data"] == {"all-reduce"} and tree["terms_seconds"]["dcn"] > 0
    assert {tuple(one["axes"]) for one in tree["collectives"] if one["network"]} == {("data",)}
    (between,) = [one["bytes"] for one in tree["collectives"] if one["network"]]
    assert 2 <= between / (tree["parameters"] / 4) <= 4, "a chip's quarter of the gradients, in bf16 or fp32"
    assert kinds["fsdp"] and kinds["tensor"] and not kinds["pipe"]
