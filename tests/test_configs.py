"""Every shipped config: what its docstring says, its JSON, its dry run at full size, and one step at a tiny size."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bertgpt_jax.commands import train
from bertgpt_jax.config import load_config, shipped_configs
from bertgpt_jax.corpus.mixture import MixtureConfig
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.planning.places import parse
from bertgpt_jax.planning.plan import make_plan, prepare
from bertgpt_jax.planning.report import as_json
from bertgpt_jax.training import dry_run, setup
from bertgpt_jax.training.run_config import RunConfig, with_steps, with_vocabulary

NAMES = sorted(shipped_configs())

PARAMETERS = {
    "bert/tiny": 4_386_000,
    "bert/mini": 11_171_000,
    "bert/base": 109_483_000,
    "bert/large": 335_143_000,
    "roberta/base": 124_646_000,
    "gpt/gpt2": 124_440_000,
    "gpt/gpt2_medium": 354_823_000,
    "gpt/gpt2_large": 774_030_000,
    "gpt/gpt2_xl": 1_557_611_000,
    "gpt3/125m": 125_266_000,
    "gpt3/350m": 355_909_000,
    "gpt3/760m": 760_300_000,
    "gpt3/1_3b": 1_315_819_000,
    "gpt3/2_7b": 2_651_543_000,
    "gpt3/6_7b": 6_658_473_000,
    "gpt3/13b": 12_853_560_000,
    "gpt3/175b": 174_604_837_000,
}
"""Of the released models, at their vocabularies, without or with a pooler and heads: hence within 2%. GPT-3's follow
from table 2.1 of its paper, which rounds them."""

VOCABULARY = {"bert": 30_522, "gpt": 50_257, "roberta": 50_265, "gpt3": 50_304}


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry runs as on a machine with a single device."""
    first = jax.devices()[:1]
    monkeypatch.setattr(dry_run, "make_mesh", lambda config: make_mesh(config, first))


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse(shipped_configs()[name].read_text())) or ""


# ---------------------------------------------------------------- what they say


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name: str, repository: Path) -> None:
    text = docstring(name)
    fields = dict(re.findall(r"^(\w+): +(\S.*)$", text, re.MULTILINE))
    assert {"Paper", "Command", "Hardware", "Expect"} <= set(fields)
    assert {"Hours", "Time"} & set(fields), "how long it takes"
    words = fields["Command"].split()
    assert words[:2] == ["python", "tools/train.py"] and words[2] == f"configs/{name}.py"
    assert (repository / words[2]).samefile(shipped_configs()[name])
    corpus = load_config(name, RunConfig).corpus
    paths = [part.corpus.path for part in corpus.parts] if isinstance(corpus, MixtureConfig) else [corpus.path]
    assert ("corpus.path=" in fields["Command"]) == ("" in paths)


PLANNED = [name for name in NAMES if "\nPlan: " in docstring(name)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "gpt3/175b" else pytest.mark.long) for n in PLANNED])
def test_the_plan_that_a_config_names(name: str) -> None:
    """Its places, bytes, utilisation and days are what the planner says of it today, within the models' own error."""
    verdict = r"^Plan: +(\S+) fits: ([\d.]+) of ([\d.]+) GiB a chip \(.*\), MFU (\d+)%, ([\d.]+) days predicted$"
    found = re.findall(verdict, docstring(name), re.MULTILINE)
    places = re.search(r"planned here for (.*)$", docstring(name), re.MULTILINE)[1]
    assert found and [topology for topology, *_ in found] == re.findall(r"[\w]+:[\dx]+", places)
    for topology, needs, has, mfu, days in found:
        plan = as_json(make_plan(prepare(load_config(name, RunConfig), parse(topology)), compiling=False))
        assert plan["fits"]
        assert plan["hbm_bytes"] / 2**30 == pytest.approx(float(has), abs=0.01)
        assert plan["bytes_per_device"] / 2**30 == pytest.approx(float(needs), rel=0.10)
        assert plan["predicted_mfu"] * 100 == pytest.approx(float(mfu), abs=3)
        assert plan["days"] == pytest.approx(float(days), rel=0.10, abs=0.05)


def test_what_is_planned_for_pods_says_so() -> None:
    assert {name for name in NAMES if name.startswith("gpt3/")} | {"bert/large_pod"} == set(PLANNED)


@pytest.mark.parametrize("name", NAMES)
def test_printed_config_is_the_config(name: str, capsys, tmp_path: Path) -> None:
    assert train.main([name, "--print-config", "--workdir", str(tmp_path / "run")]) == 0
    saved = tmp_path / "config.json"
    saved.write_text(capsys.readouterr().out)
    assert load_config(str(saved), RunConfig) == load_config(name, RunConfig)
    assert list(tmp_path.iterdir()) == [saved]


# ---------------------------------------------------------------- full size, abstractly


@pytest.mark.parametrize("name", NAMES)
def test_dry_run(name: str, one_device: None, capsys, tmp_path: Path) -> None:
    family = name.partition("/")[0]
    overrides = [f"model.vocab_size={VOCABULARY[family]}"] if name in PARAMETERS else []
    overrides += ["execution.mesh.tensor=1"]  # what is planned for a pod may ask for more
    assert train.main([name, *overrides, "--dry-run", "--workdir", str(tmp_path / "run")]) == 0
    report = capsys.readouterr().out
    count = int(re.search(r"([\d,]+) parameters", report)[1].replace(",", ""))
    if name in PARAMETERS:
        assert count == pytest.approx(PARAMETERS[name], rel=0.02)
    config = load_config(name, RunConfig)
    assert report.count("\nstage ") == len(config.stages) and "FLOP a token" in report
    # parameters and two moments in fp32
    mebibytes = float(re.search(r"params ([\d,.]+) MiB", report)[1].replace(",", ""))
    assert mebibytes == pytest.approx(count * 4 / 2**20, rel=0.01)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- tiny size, for real


def tiny(name: str) -> RunConfig:
    """The config with its own recipe, two layers of width 32, and a batch of 8 rows."""
    config = load_config(name, RunConfig)
    overrides = ["model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.intermediate_size=64"]
    overrides += ["model.max_positions=32", "model.vocab_size=null", "execution.compute.unroll_layers=false"]
    for i in range(len(config.stages)):
        overrides += [
            f"stages.{i}.{key}" for key in ("batch_ramp=[]", "batch_size=8", "sequence_length=32", "microbatches=1")
        ]
    return with_steps(
        with_vocabulary(load_config(name, RunConfig, overrides), 64), [lambda length: 64] * len(config.stages)
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_traces(name: str) -> None:
    """A step of each stage, with its optimizer and schedule, gives back a state of the same shapes and dtypes."""
    config = tiny(name)
    program = setup.make_program(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    for stage in config.stages:
        given = setup.stage_state(program, stage)
        state, metrics = setup.lower_train_step(program, stage).out_info
        assert jax.tree.map(describe, state) == jax.tree.map(describe, given)
        assert {"loss", "learning_rate", "grad_norm"} <= set(metrics)


def describe(leaf: jax.ShapeDtypeStruct) -> tuple:
    return leaf.shape, leaf.dtype


ONE_OF_A_KIND = (
    "bert/base",
    "bert/large_pod",
    "gpt/gpt2",
    "gpt3/175b",
    "gpt/shakespeare_char",
    "mixture",
    "roberta/base",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ONE_OF_A_KIND else pytest.mark.long) for n in NAMES]
)
def test_one_step(name: str) -> None:
    """A step from the initial state on made-up rows: the loss is that of chance, parameters follow the rate."""
    config = tiny(name)
    program = setup.make_program(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    stage, state = config.stages[0], program.init()
    before = jax.tree.map(jnp.copy, state["params"])
    batch = {key: filled(key, x) for key, x in program.abstract_batch(stage).items()}
    state, metrics = setup.lower_train_step(program, stage).compile()(state, batch)
    chance = math.log(64) + (math.log(2) if "next_labels" in batch else 0)
    assert float(metrics["loss"]) == pytest.approx(chance, abs=0.3)
    assert int(state["step"]) == 1 and all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state))
    rate = float(metrics["learning_rate"])
    assert rate == pytest.approx(float(stage.schedule(jnp.int32(0))))
    moved = any(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (before, state["params"])), strict=True))
    assert moved == (rate > 0)


def filled(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Tokens that vary with the place, labels that do so differently, everything real and of weight 1."""
    place = jnp.arange(math.prod(shape.shape)).reshape(shape.shape)
    if name in ("tokens", "targets", "mask_labels"):
        return (place * (1 if name == "tokens" else 37) % 64).astype(shape.dtype)
    return (jnp.ones if name.endswith("weights") or name == "segments" else jnp.zeros)(shape.shape, shape.dtype)
