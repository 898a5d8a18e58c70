"""Configs: overrides, JSON both ways, identity against execution, differences, files that are wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from bertgpt_jax import config as module
from bertgpt_jax.config import (
    ADDED,
    EXECUTION,
    Config,
    apply_overrides,
    differences,
    fingerprint,
    identity,
    load_config,
    parse_json,
    shipped_configs,
    to_json,
)
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.training.run_config import RunConfig


class Sgd(Config):
    kind: Literal["sgd"] = "sgd"
    rate: float = Field(0.1, gt=0)
    decay: float = 0.0
    b: float = 0.9


class Adam(Config):
    kind: Literal["adam"] = "adam"
    rate: float = Field(0.01, gt=0)
    decay: float = 0.5
    b: tuple[float, float] = (0.9, 0.999)


class Phase(Config):
    name: str = "a"
    steps: int = Field(1, ge=1)
    optimizer: Annotated[Sgd | Adam, Field(discriminator="kind")] = Sgd()

    @model_validator(mode="after")
    def _even(self) -> Phase:
        if self.steps == 13:
            raise ValueError("steps 13 is unlucky")
        return self


class Where(Config):
    workers: Annotated[int, EXECUTION] = 2
    path: str = ""


class Run(Config):
    seed: int = 0
    ratio: float | None = None
    remat: Literal["none", "full"] = "full"
    names: tuple[str, ...] = ()
    where: Where = Where()
    phases: tuple[Phase, ...] = Field((Phase(), Phase(name="b", steps=2)), min_length=1)
    execution: Annotated[Where, EXECUTION] = Where()


def changed(*overrides: str, start: Run | None = None) -> Run:
    return apply_overrides(start or Run(), overrides)


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        changed(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize("key", ["phases.1.steps", "phases.b.steps"])
def test_items_by_index_and_by_name(key: str) -> None:
    assert [phase.steps for phase in changed(f"{key}=7").phases] == [1, 7]


def test_null_is_none_and_none_is_a_word() -> None:
    assert changed("ratio=null", start=Run(ratio=0.5)).ratio is None
    assert changed("ratio=None", start=Run(ratio=0.5)).ratio is None
    assert changed("remat=none").remat == "none"


def test_json_for_tuples_and_sub_configs() -> None:
    assert changed('names=["x", "y"]').names == ("x", "y")
    assert changed('where={"path": "p"}').where == Where(path="p")
    assert changed("where.path=[not json").where.path == "[not json"


def test_text_keeps_its_equals_signs() -> None:
    assert changed("where.path=a=b").where.path == "a=b"


def test_kind_swap_keeps_what_was_set() -> None:
    start = Run(phases=(Phase(optimizer=Sgd(rate=3.0)),))
    swapped = changed("phases.0.optimizer.kind=adam", start=start).phases[0].optimizer
    assert swapped == Adam(rate=3.0)  # `decay` was at its default and takes the new one; `b` is of another type


@pytest.mark.parametrize("flip", [False, True])
def test_fields_of_the_new_kind_can_be_set_in_any_order(flip: bool) -> None:
    given_ = ["phases.0.optimizer.kind=adam", "phases.0.optimizer.b=[0.1, 0.2]", "phases.0.optimizer.decay=2"]
    found = changed(*(given_[::-1] if flip else given_)).phases[0].optimizer
    assert found == Adam(b=(0.1, 0.2), decay=2.0)


@pytest.mark.parametrize("flip", [False, True])
def test_the_whole_is_set_before_its_parts(flip: bool) -> None:
    given_ = ['phases=[{"steps": 5}]', "phases.0.optimizer.kind=adam", "phases.0.optimizer.rate=2"]
    found = changed(*(given_[::-1] if flip else given_)).phases
    assert found == (Phase(steps=5, optimizer=Adam(rate=2.0)),)


def test_the_last_of_two_equal_keys_counts() -> None:
    assert changed("seed=1", "seed=2").seed == 2


def test_nothing_given_nothing_changed() -> None:
    assert changed() == Run()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sede=1", "did you mean 'seed'?"),
        ("where.pth=1", "did you mean 'where.path'?"),
        ("phases.0.optimizer.decai=1", "did you mean 'phases.0.optimizer.decay'?"),
        ("xyzzy=1", "unknown key 'xyzzy'; known: ['seed', "),
        ("seed.x=1", "unknown key 'seed.x'"),
        ("phases.2.steps=1", "'2' is no item of 'phases' (0..1: ['a', 'b'])"),
        ("phases.c.steps=1", "'c' is no item of 'phases'"),
        ("phases.-1.steps=1", "'-1' is no item"),
        ("seed", "override 'seed' has no '='"),
        ("seed=1.5", "seed = '1.5'"),
        ("ratio=nan", "ratio = 'nan': input should be a finite number"),
        ("phases.0.optimizer.kind=adm", "phases.0.optimizer.kind = 'adm': did you mean 'adam'? known: sgd, adam"),
        ("phases.b.optimizer.rate=-1", "phases.1.optimizer.rate = '-1': input should be greater than 0"),
        ("phases.a.steps=13", "phases.0: steps 13 is unlucky"),
        ("phases=[]", "phases"),
        ('phases=[{"stesp": 1}]', "unknown key 'phases.0.stesp'"),
        ('where={"path": "a", "path": "b"}', "where"),
    ],
)
def test_refused(override: str, said: str) -> None:
    assert said in refused(override)


def test_all_problems_at_once() -> None:
    message = refused("sede=1", "where.pth=2", "seed")
    assert all(part in message for part in ("'seed'", "'where.path'", "no '='"))
    message = refused("seed=x", "ratio=y", "phases.0.steps=0")
    assert all(part in message for part in ("seed = 'x'", "ratio = 'y'", "phases.0.steps = '0'"))


def test_wrong_items_are_not_called_too_few() -> None:
    assert "at least 1 item" not in refused('phases=[{"steps": 0}]')


# ---------------------------------------------------------------- JSON, identity, differences

runs = st.builds(
    Run,
    seed=st.integers(),
    ratio=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    remat=st.sampled_from(["none", "full"]),
    names=st.lists(st.text(), max_size=3).map(tuple),
    where=st.builds(Where, workers=st.integers(), path=st.text()),
    phases=st.lists(
        st.builds(
            Phase,
            name=st.text(max_size=3),
            steps=st.integers(14, 10**6),
            optimizer=st.builds(Sgd, rate=st.floats(1e-9, 1e9))
            | st.builds(Adam, b=st.tuples(st.floats(0, 1), st.floats(0, 1))),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    execution=st.builds(Where, workers=st.integers(), path=st.text()),
)


@given(runs)
def test_json_round_trip(run: Run) -> None:
    assert module.build(Run, parse_json(to_json(run), "x"), "x") == run


@given(runs, runs)
def test_overrides_reach_every_config(start: Run, end: Run) -> None:
    """Any config becomes any other by overrides of its fields given as JSON."""
    overrides = [f"{name}={json.dumps(value)}" for name, value in end.model_dump(mode="json").items()]
    overrides = [item for item in overrides if not item.startswith(("remat", "ratio"))]
    ratio = "null" if end.ratio is None else repr(end.ratio)
    assert changed(*overrides, f"remat={end.remat}", f"ratio={ratio}", start=start) == end


shipped = st.sampled_from(["quickstart", "gpt/gpt2", "bert/large_lamb", "roberta/base"])
run_overrides = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**31 - 1),
        "model.num_layers": st.integers(1, 99),
        "model.hidden_dropout": st.floats(0, 1, exclude_max=True),
        "stages.0.optimizer.kind": st.sampled_from(["adamw", "bert_adam", "lamb", "adafactor", "lion", "muon"]),
        "stages.0.optimizer.weight_decay": st.floats(0, 1),
        "stages.0.schedule.kind": st.sampled_from(["linear", "cosine", "one_minus_sqrt", "constant", "rsqrt"]),
        "stages.0.schedule.peak": st.floats(1e-9, 1),
        "corpus.tokenizer.kind": st.sampled_from(["wordpiece", "byte_bpe", "sentencepiece", "characters"]),
        "corpus.path": st.sampled_from(["a.txt", '["a", "b"]']),
        "execution.mesh.fsdp": st.integers(1, 8),
        "execution.compute.remat": st.sampled_from(["none", "dots", "full"]),
        "execution.eval_every": st.none() | st.integers(1, 9),
    },
)


@settings(max_examples=40, deadline=None)
@given(shipped, run_overrides)
def test_overridden_saved_and_loaded_is_the_same_run(tmp_path_factory, name: str, overrides: dict[str, Any]) -> None:
    items = [f"{key}={'null' if value is None else value}" for key, value in overrides.items()]
    items += [f"stages.{i}.reset_optimizer=true" for i in (1,) if name in ("quickstart", "bert/large_lamb")]
    run = load_config(name, RunConfig, items)
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(to_json(run))
    again = load_config(str(path), RunConfig)
    assert again == run and fingerprint(identity(again)) == fingerprint(identity(run))
    assert all(str(_at(run, key)) == str(value) for key, value in overrides.items() if key != "corpus.path")


def _at(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value


@given(runs, runs)
def test_differences_are_what_differs(a: Run, b: Run) -> None:
    left, right = a.model_dump(mode="json"), b.model_dump(mode="json")
    found = differences(left, right)
    assert bool(found) == (left != right) and differences(left, left) == {}
    assert differences(right, left) == {path: (new, old) for path, (old, new) in found.items()}


def test_differences_name_paths() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "gone": 0}
    new = {"a": {"b": 2, "c": [1, 3, 4]}, "new": {"x": 1}}
    assert differences(old, new) == {
        "a.b": (1, 2),
        "a.c.1": (2, 3),
        "a.c.2": (None, 4),
        "gone": (0, None),
        "new": (None, {"x": 1}),
    }


def test_a_field_added_later_is_identity_only_where_it_is_set() -> None:
    class Younger(Where):
        split: Annotated[str, ADDED] = "train"
        inner: Annotated[Where, ADDED] = Where()

    assert identity(Younger()) == identity(Younger(split="train", inner=Where())) == identity(Where())
    assert identity(Younger(split="test")) == {"path": "", "split": "test"}
    assert identity(Younger(inner=Where(path="p"))) == {"path": "", "inner": {"path": "p"}}


def test_execution_is_no_part_of_the_identity() -> None:
    elsewhere = changed("where.workers=9", "execution.path=x")
    assert identity(elsewhere) == identity(Run()) and "execution" not in identity(Run())
    assert fingerprint(identity(changed("where.path=x"))) != fingerprint(identity(Run()))
    assert identity(Run())["phases"][0]["optimizer"]["kind"] == "sgd"


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("execution.mesh.tensor=2", True),
        ("execution.compute.dtype=bfloat16", True),
        ("stages.0.microbatches=2", True),
        ("stages.0.steps=12", True),
        ("corpus.path=elsewhere", True),
        ("corpus.workers=1", True),
        ("seed=1", False),
        ("stages.0.batch_size=64", False),
        ("stages.0.optimizer.kind=lion", False),
        ("model.hidden_dropout=0.5", False),
        ("corpus.tokenizer.lowercase=false", False),
        ("objective.masking.rate=0.3", False),
    ],
)
def test_what_may_change_on_resume(override: str, same: bool) -> None:
    one_stage = 'stages=[{"steps": 10, "sequence_length": 64, "batch_size": 32}]'
    before, after = (identity(load_config("quickstart", RunConfig, [one_stage, *o])) for o in ([], [override]))
    assert (before == after) is same


def test_configs_are_frozen_and_hashable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Run().seed = 1
    assert len({Run(), Run(), changed("seed=1")}) == 2


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "x: key 'c' is given twice"),
        ('{"a": NaN}', "x: NaN is not"),
        ('{"a": [Infinity]}', "x: Infinity is not"),
        ('{"a": -Infinity}', "x: -Infinity is not"),
        ('{\n"a": 1, // one\n}', "x:2: not JSON"),
        ("", "x:1: not JSON"),
    ],
)
def test_json_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="^" + said.replace("'", ".")):
        parse_json(text, "x")


PYTHON = {
    "syntax": ("def get_config():\n    return (\n", "config.py:2: "),
    "raises": ("import math\n\ndef get_config():\n    return math.sqrt(-1)\n", "config.py:4: ValueError: "),
    "imports": ("import no_such_module_here\n", "config.py:1: ModuleNotFoundError: "),
    "nothing": ("x = 1\n", "config.py must define get_config()"),
    "no function": ("get_config = 3\n", "config.py must define get_config()"),
    "another type": ("def get_config():\n    return {}\n", "get_config() returned dict, not RunConfig"),
    "invalid": (
        "from bertgpt_jax.training.optim import AdamW\n\ndef get_config():\n    return AdamW(b2=1.0, lrr=3)\n",
        "config.py: b2 = 1.0: input should be less than 1; unknown key 'lrr'",
    ),
}


@pytest.mark.parametrize("case", PYTHON)
def test_python_configs_that_are_wrong(case: str, tmp_path: Path) -> None:
    text, said = PYTHON[case]
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), RunConfig)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_json_config_that_others_may_write_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("\"__import__('os')\"")
    with pytest.raises(ConfigError, match="dictionary"):
        load_config(str(path), RunConfig)


def test_a_python_config_that_others_may_write_is_a_warning(tmp_path: Path, capsys) -> None:
    path = tmp_path / "config.py"
    path.write_text(Path(shipped_configs()["quickstart"]).read_text())
    path.chmod(0o666)
    load_config(str(path), RunConfig)
    assert "writable by everyone" in capsys.readouterr().err


def test_names_of_shipped_configs_and_near_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("bert/base", RunConfig) == load_config(str(shipped_configs()["bert/base"]), RunConfig)
    for name, near in (("bert/bsae", "bert/base"), ("gpt2", "gpt/gpt2"), ("quikstart", "quickstart")):
        with pytest.raises(ConfigError, match=f"'{name}' not found; did you mean '{near}'"):
            load_config(name, RunConfig)
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(ConfigError, match="did you mean 'mine.py'"):
        load_config("mien.py", RunConfig)
    with pytest.raises(ConfigError, match="not found; shipped: .*quickstart"):
        load_config("%%%", RunConfig)
    with pytest.raises(ConfigError, match="must end in .py or .json"):
        load_config(sys.executable, RunConfig)
