"""Plans of small runs: compiled for CPU devices, along ramps, padded, rounded, refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest

from bertgpt_jax.commands.plan import main
from bertgpt_jax.config import load_config, to_json
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.parallel.sharding import bytes_per_device
from bertgpt_jax.planning import compiled, places, search
from bertgpt_jax.planning.memory import held_bytes
from bertgpt_jax.planning.plan import make_plan, parse_mesh, planned_state, prepare
from bertgpt_jax.training import setup
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig, with_changes
from bertgpt_jax.training.schedules import Constant

SIZES = dict(vocab_size=512, max_positions=64, hidden_size=64, num_heads=4, intermediate_size=128, num_layers=2)


def run_config(**stage) -> RunConfig:
    shape = dict(steps=100, sequence_length=64, batch_size=32, schedule=Constant(peak=1e-3))
    return RunConfig(
        corpus=CorpusConfig(path="unused"),
        model=GptConfig(**SIZES),
        objective=CausalLM(),
        stages=(StageConfig(**shape | stage),),
        execution=ExecutionConfig(compute=ComputeConfig(unroll_layers=False)),
    )


@pytest.fixture
def saved(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(to_json(run_config()))
    return str(path)


# ---------------------------------------------------------------- without compiling


def test_gpt3s_ramp_on_256_shards() -> None:
    """32k tokens are 16 rows: filled up to 256, counted as 16; each shape's time enters the days."""
    prepared = prepare(load_config("gpt3/13b", RunConfig), places.parse("v5e:16x16"))
    (note,) = prepared.notes
    assert "16 to 256" in note and "weight 0" in note
    plan = make_plan(prepared, compiling=False)
    (stage,) = plan.stages
    first, *_, last = stage.shapes
    assert (first.rows, first.computed, first.first) == (16, 256, 0) and last.rows == last.computed == 1024
    assert [s.first + s.steps for s in stage.shapes[:-1]] == [s.first for s in stage.shapes[1:]]
    tokens = sum(shape.steps * shape.rows * shape.length for shape in stage.shapes)
    assert 300e9 <= tokens < 300e9 + 1024 * 2048
    assert plan.days == pytest.approx(sum(shape.steps * shape.seconds for shape in stage.shapes) / 86_400)
    assert first.seconds < last.seconds and first.seconds / first.rows > last.seconds / last.rows


def test_stages_of_a_pipeline_hold_a_share_of_the_batch_too() -> None:
    """Rows are filled up, and cut into parts, as the trainer does it."""
    ramped = run_config(batch_size=24, microbatches=1, batch_ramp=((0, 2), (10, 24)), steps=100)
    prepared = prepare(ramped, places.parse("cpu:8"), parse_mesh("data=2,fsdp=2,pipe=2"))
    (note,) = prepared.notes
    assert "2 to 8" in note
    (stage,) = make_plan(prepared, compiling=False).stages
    real = setup.make_program(prepared.config, make_mesh(prepared.config.execution.mesh, jax.devices()[:8]))
    of_run = [setup.shape_config(real, real.config.stages[0], s) for s in real.config.stages[0].ramp().segments]
    assert [(s.computed, s.parts) for s in stage.shapes] == [(s.batch_size, s.microbatches) for s in of_run]
    assert [s.computed for s in stage.shapes] == [8, 24]
    odd = prepare(run_config(batch_size=20, microbatches=1), places.parse("cpu:8"), parse_mesh("data=4,pipe=2"))
    assert odd.config.stages[0].batch_size == 24 and "set batch_size=24" in odd.notes[0]


def test_parts_along_175bs_ramp_are_the_trainers() -> None:
    prepared = prepare(load_config("gpt3/175b", RunConfig), places.parse("v5p:8x8x16"))
    (stage,), (config,) = make_plan(prepared, compiling=False).stages, prepared.config.stages
    most = config.batch_size * config.sequence_length // config.microbatches
    for shape in stage.shapes:
        assert shape.computed % (256 * shape.parts) == 0
        assert shape.computed // shape.parts * shape.length <= most or shape.computed == 256 * shape.parts


def test_gpus_of_several_hosts_talk_over_the_network() -> None:
    plan = make_plan(prepare(load_config("gpt3/1_3b", RunConfig), places.parse("h100:64"), parse_mesh("fsdp=64")),
                     compiling=False)  # fmt: skip
    time = plan.main.time
    assert time.dcn > 0 == time.ici and time.by_axis["fsdp"] == pytest.approx(time.dcn)
    inside = make_plan(prepare(load_config("gpt3/1_3b", RunConfig), places.parse("h100:8"), parse_mesh("fsdp=8")),
                       compiling=False)  # fmt: skip
    assert inside.main.time.ici > 0 == inside.main.time.dcn
    assert "8 hosts" in plan.place.describe() and "a switch in each host" in plan.place.describe()


def test_a_batch_that_the_mesh_does_not_divide_is_rounded_up() -> None:
    prepared = prepare(run_config(batch_size=30, microbatches=4), places.parse("v5e:4x4"))
    stage = prepared.config.stages[0]
    assert (stage.batch_size, stage.microbatches) == (32, 2)
    assert len(prepared.notes) == 2 and "set batch_size=32" in prepared.notes[0]
    assert "set microbatches=2" in prepared.notes[1]
    even = prepare(run_config(), places.parse("v5e:4x4"))
    assert even.notes == () and even.config.stages == run_config().stages


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"])
def test_bytes_of_the_state_are_those_of_the_shardings(mesh: str) -> None:
    """Counted from one device's layout, they are what the mesh's own shardings say."""
    config, place = run_config(), places.parse("cpu:8")
    prepared = prepare(config, place, parse_mesh(mesh))
    real = setup.make_program(prepared.config, make_mesh(prepared.config.execution.mesh, jax.devices()[:8]))
    for part in ("params", "optimizer"):
        tree = real.abstract_state[part]
        expected = bytes_per_device(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))
        assert held_bytes(prepared.program.abstract_state[part], prepared.sizes) == expected


@pytest.mark.parametrize("mesh", ["data=8", "data=4,fsdp=2"])
def test_replicas_that_divide_the_optimizer(mesh: str) -> None:
    """Its bytes are those of the real shardings, and a part of what each replica would hold otherwise."""
    plain = run_config()
    sizes, execution = plain.model.model_dump() | {"vocab_size": 4096}, plain.execution.model_dump(mode="json")
    config = with_changes(plain, {"model": sizes, "execution": execution | {"shard_optimizer": True}})
    prepared = prepare(config, places.parse("cpu:8"), parse_mesh(mesh))
    real = setup.make_program(prepared.config, make_mesh(prepared.config.execution.mesh, jax.devices()[:8]))
    tree = real.abstract_state["optimizer"]
    expected = bytes_per_device(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))
    stage = prepared.config.stages[0]
    assert held_bytes(planned_state(prepared, stage)["optimizer"], prepared.sizes) == expected
    assert expected < 0.7 * held_bytes(prepared.program.abstract_state["optimizer"], prepared.sizes)


@pytest.mark.parametrize(
    ("mesh", "shown"),
    [
        ("fsdp=7", ["fsdp=7", "16 devices"]),
        ("fsd=4", ["--mesh 'fsd=4'", "data, fsdp, pipe, context, tensor"]),
        ("fsdp=x", ["--mesh", "fsdp", "'x'"]),
        ("", ["axes are"]),
        ("fsdp=2,fsdp=4", ["axes are", "each once"]),
        ("pipe=4", ["num_layers 2", "mesh.pipe = 4"]),
        ("context=3", ["does not multiply to 16"]),
    ],
)
def test_meshes_that_do_not_fit(mesh: str, shown: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        prepare(run_config(), places.parse("v5e:4x4"), parse_mesh(mesh))
    assert [part for part in shown if part not in str(raised.value)] == [], raised.value


def test_sequences_and_heads_that_the_mesh_does_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"sequence_length 64 is not divisible by .*context.* = 128"):
        prepare(run_config(), places.parse("v5e:8x8"), parse_mesh("data=1,context=64"))
    prepared = prepare(run_config(), places.parse("v5e:2x4"), parse_mesh("data=1,tensor=8"))
    with pytest.raises(ConfigError, match=r"num_heads 4 is not divisible by mesh tensor = 8; use one of \[1, 2, 4\]"):
        make_plan(prepared, compiling=False)
    prepared = prepare(run_config(), places.parse("v5e:8x16"), parse_mesh("data=1,fsdp=128"))
    with pytest.raises(ConfigError, match=r"size 64 of dimension . is not divisible by mesh fsdp = 128; .* size 128"):
        make_plan(prepared, compiling=False)


def test_short_sequences_of_a_ramp_that_the_mesh_does_not_divide() -> None:
    ramped = run_config(length_ramp=((0, 24), (10, 64)))
    with pytest.raises(ConfigError, match=r"sequence_length 24 is not divisible by .*context"):
        prepare(ramped, places.parse("v5e:4x4"), parse_mesh("data=1,context=16"))


def test_slices_need_replicas() -> None:
    with pytest.raises(ConfigError, match="mesh.data = 1 cannot be shared out among 2 slices"):
        prepare(run_config(), places.parse("v5e:4x4", 2), parse_mesh("data=1,fsdp=32"))


# ---------------------------------------------------------------- compiled


@pytest.mark.slow
def test_compiled_for_cpu_devices(saved: str, capsys) -> None:
    """In a process of its own: this one has eight devices, the plan four."""
    assert main([saved, "--topology", "cpu:4", "--mesh", "data=2,fsdp=2", "--json", "--price", "2"]) == 0
    tree = json.loads(capsys.readouterr().out)
    keys = {"chips", "fits", "bytes_per_device", "hbm_bytes", "compile_seconds", "predicted_step_seconds"}
    assert keys | {"predicted_mfu", "binding", "stages", "bytes", "collectives", "days", "cost"} <= set(tree)
    assert (tree["chips"], tree["fits"], tree["mesh"]["fsdp"]) == (4, True, 2)
    assert tree["bytes_per_device"] > tree["bytes"]["params"] + tree["bytes"]["optimizer"]
    assert tree["cost"] == pytest.approx(tree["days"] * 24 * 4 * 2)
    found = {(one["kind"], tuple(one["axes"])) for one in tree["collectives"]}
    assert ("all-gather", ("fsdp",)) in found, found
    sent = {axis for one in tree["collectives"] for axis in one["axes"]}
    assert sent == {"data", "fsdp"}


@pytest.mark.slow
def test_what_the_child_refuses_is_one_line(saved: str, capsys) -> None:
    """What only the mesh of real devices shows; without compiling nothing is refused."""
    asked = [saved, "dropout_prng=philox", "--topology", "cpu:2"]
    assert main([*asked, "--no-compile"]) == 0
    assert main(asked) == 78
    error = capsys.readouterr().err
    assert error.startswith("error: dropout_prng = 'philox' on 2 devices") and error.count("\n") == 1


# ---------------------------------------------------------------- what does not fit


def test_too_large_ends_with_78_and_says_what_would_fit(capsys) -> None:
    assert main(["gpt/gpt2_xl", "model.vocab_size=50304", "--topology", "v5e:4x4", "--no-compile"]) == 78
    shown = capsys.readouterr()
    assert "DOES NOT FIT" in shown.out and "GiB a device of 15.75" in shown.out
    error = shown.err.strip()
    assert error.startswith("error: stage pretrain does not fit: ") and "\n" not in error
    assert "of 15.75 on v5e; use fsdp=16" in error


@pytest.mark.parametrize(
    ("config", "topology", "advised"),
    [
        ("gpt3/13b", "v5e:4x4", r"take v5e:\d+x\d+, with "),
        ("gpt3/175b", "v6e:8x16", r"take v6e:16x16 --slices (\d+), with .* execution.mesh.dcn_fsdp=\1"),
    ],
)
def test_where_nothing_fits_a_place_is_named_on_which_it_does(config: str, topology: str, advised: str, capsys) -> None:
    assert main([config, "--topology", topology, "--no-compile", "--json"]) == 78
    shown = capsys.readouterr()
    assert json.loads(shown.out)["fits"] is False
    place, slices, mesh, remat, parts = re.search(
        r"take (\S+?)(?: --slices (\d+))?, with (\S+) remat=(\w+) microbatches=(\d+)", shown.err
    ).groups()
    assert re.search(advised, shown.err)
    there = ["--topology", place, "--slices", slices or "1", "--mesh", mesh if "data" in mesh else f"data=1,{mesh}"]
    settings = [f"execution.compute.remat={remat}", f"stages.0.microbatches={parts}"]
    settings += re.findall(r"execution\.mesh\.dcn_fsdp=\d+", shown.err)
    assert main([config, *settings, *there, "--no-compile"]) == 0


def test_a_model_that_no_place_holds() -> None:
    huge = ["model.num_layers=4", "model.hidden_size=4194304", "model.num_heads=1", "model.intermediate_size=128"]
    prepared = prepare(load_config("gpt3/125m", RunConfig, huge), places.parse("v5e:4x4"))
    found = search.larger_place(prepared, prepared.config.stages[0])
    assert found == "no number of chips v5e would do; use a smaller model or sequence_length"


def test_what_failed_is_not_advised_again() -> None:
    """A compiler that wants more than the model said: what failed is left out, and so is what is as large."""
    prepared = prepare(load_config("gpt3/1_3b", RunConfig), places.parse("v5e:16x16"))
    plan = make_plan(prepared, compiling=False)
    has, (stage,) = plan.place.chip.usable_bytes, plan.stages
    refused = compiled.Compiled(1.0, 1.0, 0, 0, 0, int(1.1 * has), False, (), (0, 0), 0)
    failed = dataclasses.replace(plan, stages=(dataclasses.replace(stage, compiled=refused),))
    said = search.advice(prepared, failed)
    assert f"does not fit: {1.1 * has / 2**30:.1f} GiB a device" in said
    ways = re.search(r"use (\S+) remat=(\w+) microbatches=(\d+)|take ", said)
    assert ways and ways.groups() != ("fsdp=256", stage.work.remat, str(stage.work.microbatches))


def test_the_compilers_own_words_on_memory() -> None:
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.60G of 15.75G hbm."
    assert compiled.needed_bytes(message) == int(33.6 * 2**30)
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (480.00G) exceeds"
    )
    assert compiled.needed_bytes(message) == 480 * 2**30
    assert compiled.needed_bytes("INVALID_ARGUMENT: something else") is None


# ---------------------------------------------------------------- search


def test_a_search_ranks_by_time_among_those_that_fit() -> None:
    place = places.parse("v5e:16x16")
    start = MeshConfig(data=1, tensor=-1)
    prepared = prepare(load_config("gpt3/1_3b", RunConfig), place, start)
    ranked = search.candidates(prepared, prepared.config.stages[0])
    assert ranked and all(c.bytes_per_device <= place.chip.usable_bytes for c in ranked)
    assert [c.seconds for c in ranked] == sorted(c.seconds for c in ranked)
    assert all(c.shards.chips == 256 for c in ranked) and len({c.shards for c in ranked}) > 5
    assert {c.remat for c in ranked} == set(search.REMAT)
    best = search.with_candidate(prepared.config, 0, ranked[0])
    assert best.execution.mesh.resolve(256) == dict(zip(prepared.sizes, ranked[0].shards, strict=True))
    assert best.execution.compute.remat == ranked[0].remat
    assert best.stages[0].microbatches == ranked[0].microbatches


@pytest.mark.slow
def test_175b_has_a_layout_of_60_percent_on_1024_v5p(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the search would compile first; the compiled table has its bytes."""
    place = places.parse("v5p:8x8x16")
    tried = []

    def plan(prepared, price=None):
        tried.append(prepared)
        return make_plan(prepared, compiling=False)

    monkeypatch.setattr(search, "make_plan", plan)
    _, plans = search.search(load_config("gpt3/175b", RunConfig), place, 2)
    assert len(plans) == len(tried) == 2 and plans[0].days <= plans[1].days
    stage = plans[0].main
    flops = stage.flops_per_token[0] * stage.work.positions
    assert flops / stage.time.total / (1024 * place.chip.flops) >= 0.60
    assert stage.time.binding == "matmul" and plans[0].fits


# ---------------------------------------------------------------- refusals of the command


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["--topology", "v5e:3x3"], 78, "v5e:2x4 and v5e:4x4"),
        (["--topology", "v5e:4x4", "--slices", "0"], 64, "--slices 0"),
        (["--topology", "v5e:4x4", "--search", "--mesh", "fsdp=4"], 64, "--search chooses the mesh"),
        (["--topology", "v5e:4x4", "--png", "x.jpg"], 64, "must end in .png"),
        (["--topology", "v5e:4x4", "--price", "-1"], 64, "too small"),
        ([], 64, "--topology"),
    ],
)
def test_refused(saved: str, arguments: list[str], code: int, shown: str, capsys) -> None:
    assert main([saved, *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and shown in error and error.count("\n") == 1


@pytest.mark.parametrize(("topology", "extra"), [("v5e:4x4", "libtpu"), ("h200:8", "cuda")])
def test_a_compiler_that_is_not_installed(topology: str, extra: str, saved: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert main([saved, "--topology", topology]) == 78
    assert f"pip install 'bertgpt_jax[{extra}]'" in capsys.readouterr().err


def test_a_picture(saved: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "plan.png"
    arguments = [
        saved,
        "--topology",
        "v5e:4x4",
        "--no-compile",
        "--png",
        str(out),
        "--json",
        str(tmp_path / "plan.json"),
    ]
    assert main(arguments) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and json.loads((tmp_path / "plan.json").read_text())["fits"]
    assert str(out) in capsys.readouterr().out
    assert dataclasses.is_dataclass(places.Place)
