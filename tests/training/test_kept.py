"""Programs kept for the next start: under which names, that they train the same, and what becomes of damaged ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.commands.train import main
from bertgpt_jax.config import load_config
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.training import compilation, kept, setup
from bertgpt_jax.training.compilation import Compiler
from bertgpt_jax.training.run_config import RunConfig, with_changes, with_vocabulary

TINY = str(Path(__file__).parent.parent / "faults" / "tiny.py")

pytestmark = pytest.mark.usefixtures("cache_untold")


@pytest.fixture
def surroundings() -> Iterator[None]:
    """What surrounds a program is looked at anew, here and afterwards."""
    kept._surroundings.cache_clear()
    yield
    kept._surroundings.cache_clear()


@pytest.fixture
def config() -> RunConfig:
    return with_vocabulary(load_config(TINY, RunConfig, []), 256)


def mesh(devices: int = 1) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:devices])


def doubling(shift: float = 0.0) -> Any:
    return jax.jit(lambda x: 2 * x + shift).lower(jax.ShapeDtypeStruct((4,), jnp.float32))


# ---------------------------------------------------------------- whole runs


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def fingerprint(workdir: Path) -> int:
    return json.loads((workdir / "STATUS.json").read_text())["state_fingerprint"]


@pytest.mark.parametrize("data", [1, 4])
def test_the_second_start_reads_what_the_first_compiled_and_trains_the_same(
    data: int, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n\n".join(f"The cat number {i} sat.\nIt saw {i * i} birds fly." for i in range(80))
    (tmp_path / "text.txt").write_text(text)
    changes = (f"execution.mesh.data={data}", "corpus.tokenizer.vocab_size=100")
    monkeypatch.setattr(jax, "devices", lambda *_, _all=jax.devices: _all()[:data])

    def start(name: str) -> str:
        where = ["--workdir", str(tmp_path / name), f"execution.compilation_cache={tmp_path / 'cache'}"]
        assert main([TINY, f"corpus.path={tmp_path / 'text.txt'}", *where, *changes]) == 0
        return capsys.readouterr().out

    assert "compiled stage short" in start("cold")
    monkeypatch.setattr(setup, "lower_train_step", lambda *_: pytest.fail("traced"))
    monkeypatch.setattr(setup, "lower_eval_step", lambda *_: pytest.fail("traced"))
    out = start("warm")
    assert "read the programs of stage short" in out and "read the programs of stage long" in out
    assert rows(tmp_path / "warm") == rows(tmp_path / "cold")
    assert fingerprint(tmp_path / "warm") == fingerprint(tmp_path / "cold")


# ---------------------------------------------------------------- names


def test_everything_that_a_program_depends_on_names_it(
    config: RunConfig, surroundings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = config.stages
    names = [
        kept.key("train", config, first, mesh()),
        kept.key("eval", config, first, mesh()),
        kept.key("train", config, second, mesh()),
        kept.key("train", with_changes(config, {"seed": 1}), first, mesh()),
        kept.key("train", config, first, mesh(2)),
        kept.key("train", config, first, make_mesh(MeshConfig(), jax.devices()[1:2])),
        kept.key("state", config, None, mesh()),
    ]
    with jax.default_matmul_precision("highest"):
        names.append(kept.key("train", config, first, mesh()))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=false")
    kept._surroundings.cache_clear()
    names.append(kept.key("train", config, first, mesh()))
    assert len(set(names)) == len(names)
    monkeypatch.undo()
    kept._surroundings.cache_clear()
    assert kept.key("train", config, first, mesh()) == names[0]


def test_code_that_changed_names_other_programs(
    surroundings: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nn").mkdir()
    (tmp_path / "__init__.py").write_text("")
    code = []
    for text in ("x = 1", "x = 2", "x = 1"):
        (tmp_path / "nn" / "attention.py").write_text(text)
        monkeypatch.setattr(kept.bertgpt_jax, "__file__", str(tmp_path / "__init__.py"))
        kept._surroundings.cache_clear()
        code.append(kept._surroundings()["code"])
    assert code[0] == code[2] != code[1]


def test_packages_that_are_no_releases_name_nothing(
    config: RunConfig, surroundings: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A jax that somebody changes in a checkout has the version that it had before."""
    monkeypatch.setattr(jax, "__file__", str(tmp_path / "jax" / "__init__.py"))
    assert kept.key("train", config, config.stages[0], mesh()) is None


# ---------------------------------------------------------------- files


def test_a_program_comes_back(tmp_path: Path) -> None:
    kept.save(tmp_path / "programs", "a", doubling(0.5).compile())
    found = kept.load(tmp_path / "programs", "a", mesh())
    np.testing.assert_array_equal(found(jnp.arange(4.0)), [0.5, 2.5, 4.5, 6.5])
    assert [file.name for file in (tmp_path / "programs").iterdir()] == ["a"]
    assert (tmp_path / "programs").stat().st_mode & 0o77 == 0
    with pytest.raises(TypeError):
        found(jnp.arange(5.0))


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"something else", flipped],
    ids=["torn", "empty", "foreign", "flipped"],
)
def test_what_cannot_be_read_is_as_if_it_were_not_there(damage: Any, tmp_path: Path) -> None:
    assert kept.load(tmp_path, "a", mesh()) is None
    kept.save(tmp_path, "a", doubling().compile())
    (tmp_path / "a").write_bytes(damage((tmp_path / "a").read_bytes()))
    assert kept.load(tmp_path, "a", mesh()) is None


def test_what_cannot_be_kept_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept.save(tmp_path / "file", "a", doubling().compile())
    kept.save(tmp_path / "programs", "a", object())
    assert not list((tmp_path / "programs").iterdir())


def test_those_read_last_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST", 2)
    program = doubling().compile()
    for age, name in enumerate("ab"):
        kept.save(tmp_path, name, program)
        os.utime(tmp_path / name, (age, age))
    assert kept.load(tmp_path, "a", mesh()) is not None
    kept.save(tmp_path, "c", program)
    assert {file.name for file in tmp_path.iterdir()} == {"a", "c"}


def test_what_jax_had_in_its_cache_is_not_kept(tmp_path: Path) -> None:
    """Written once more, it has lost functions: it loads, and fails when it is called."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    assert [kept.compiled(doubling(0.25))[1] for _ in range(2)] == [True, False]


# ---------------------------------------------------------------- the compiler


def test_programs_are_given_up_when_the_runtime_fails(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "_lower", lambda kind, *_: doubling(len(kind)))
    monkeypatch.setattr(compilation.memory, "check", lambda *_: None)

    def begin(error: Exception | None) -> list[str]:
        told: list[str] = []
        with Compiler(mesh(), directory=tmp_path) as compiler:
            compiler.start(config)
            compiler.steps(0, told.append)
            compiler._thread.shutdown()  # all are written
            if error is not None:
                raise error
        return told

    assert all(line.startswith("compiled") for line in begin(None))
    assert all(line.startswith("read") for line in begin(None))
    for error in (BrokenPipeError(), ValueError()):
        with pytest.raises(type(error)):
            begin(error)
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(jax.errors.JaxRuntimeError):
        begin(jax.errors.JaxRuntimeError("INTERNAL: a function was not found"))
    for _ in range(2):
        assert all(line.startswith("compiled") for line in begin(None)), "one start in two would fail"


def test_several_processes_keep_nothing(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They compile together; one that found its program would not come."""
    monkeypatch.setattr(compilation.jax, "process_count", lambda: 2)
    monkeypatch.setattr(compilation, "_lower", lambda *_: doubling())
    monkeypatch.setattr(compilation.memory, "check", lambda *_: None)
    with Compiler(mesh(), directory=tmp_path) as compiler:
        compiler.start(config)
        compiler.steps(0, lambda _: None)
        compiler._thread.shutdown()
    assert not list(tmp_path.iterdir())
