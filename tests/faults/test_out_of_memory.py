"""A step that does not fit: one line with bytes needed, bytes there, and settings whose bytes were computed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import pytest

from bertgpt_jax.commands.train import main
from bertgpt_jax.config import to_json
from bertgpt_jax.corpus.config import CharactersConfig, CorpusConfig, PositionSplit
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.parallel.mesh import make_mesh
from bertgpt_jax.training import memory, setup
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT of two layers over characters."""
    directory = tmp_path_factory.mktemp("memory")
    (directory / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    config = RunConfig(
        corpus=CorpusConfig(
            path=str(directory / "text.txt"),
            held_out=PositionSplit(fraction=0.1),
            tokenizer=CharactersConfig(),
            workers=0,
        ),
        model=GptConfig(
            num_layers=2,
            hidden_size=32,
            num_heads=2,
            intermediate_size=128,
            max_positions=64,
            vocab_size=512,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        objective=CausalLM(),
        stages=(StageConfig(name="only", steps=2, sequence_length=64, batch_size=64, schedule=Constant(peak=1e-2)),),
        execution=ExecutionConfig(compute=ComputeConfig(unroll_layers=False), eval_batches=1),
    )
    (directory / "config.json").write_text(to_json(config))
    return directory / "config.json"


def needed(config: Path, *overrides: str) -> int:
    """Bytes of a device that the step of a changed config takes, compiled apart."""
    from bertgpt_jax.config import load_config

    changed = load_config(str(config), RunConfig, list(overrides))
    program = setup.make_program(changed, make_mesh(changed.execution.mesh))
    return memory.step_bytes(setup.lower_train_step(program, changed.stages[0]).compile())


def offers(error: str) -> dict[str, int]:
    """Setting -> bytes, as the message gives them."""
    found = re.findall(r"((?:stages|execution)\.[^:]*): ([\d,]+) bytes", error.partition("With other settings")[2])
    return {setting: int(size.replace(",", "")) for setting, size in found}


def the_error(capsys: pytest.CaptureFixture) -> str:
    """The one line of the error."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def train(config: Path, name: str, *overrides: str) -> int:
    return main([str(config), "--workdir", str(config.parent / name), *overrides])


@pytest.mark.slow
def test_a_step_larger_than_the_machine(config: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The devices are said to hold a little less than the step needs: found before the first step."""
    whole = needed(config)
    monkeypatch.setattr(memory, "available_bytes", lambda device: whole - 1)
    assert train(config, "large") == 78
    error = the_error(capsys)
    assert "stage 'only' does not fit: a step of 64 x 64" in error
    assert f"{whole:,} bytes" in error and f"{whole - 1:,} bytes" in error
    found = offers(error)
    assert len(found) == 3 and all(size < whole for size in found.values())
    assert any(setting.startswith("stages.only.microbatches=") for setting in found)
    assert "execution.compute.remat=full" in found
    # computed: the setting given by hand comes to the same
    assert needed(config, "execution.compute.remat=full") == found["execution.compute.remat=full"]
    status = json.loads((config.parent / "large" / "STATUS.json").read_text())
    assert status["reason"] == "failed" and "does not fit" in status["message"]


class Refused:
    """A lowered step that the compiler refuses, in the words of XLA for TPUs."""

    def compile(self):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G."
        )


def test_a_compiler_that_refuses(config: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    real = setup.lower_train_step
    original = []

    def lower(program, stage):
        original.append((program.config, stage))
        return Refused() if (program.config, stage) == original[0] else real(program, stage)

    monkeypatch.setattr(setup, "lower_train_step", lower)
    assert train(config, "refused") == 78
    error = the_error(capsys)
    assert f"{int(18.5 * 2**30):,} bytes (18.50 GiB)" in error and f"{int(15.75 * 2**30):,} bytes (15.75 GiB)" in error
    assert len(offers(error)) == 3 and "still too much" not in error


def test_memory_refused_while_a_step_runs(config: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    real = setup.lower_train_step

    class Failing:
        def __init__(self, lowered):
            self._lowered = lowered

        def compile(self):
            compiled = self._lowered.compile()

            class Step:
                memory_analysis = staticmethod(compiled.memory_analysis)

                def __call__(self, state, batch):
                    raise jax.errors.JaxRuntimeError(
                        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12884901888 bytes."
                    )

            return Step()

    monkeypatch.setattr(setup, "lower_train_step", lambda *a: Failing(real(*a)))
    assert train(config, "running") == 78
    error = the_error(capsys)
    assert "does not fit" in error and len(offers(error)) == 3


def test_parameters_that_no_machine_holds(config: Path, capsys) -> None:
    """Their state fails to be drawn while the step compiles: that is no reason to tell anything else."""
    huge = ("model.hidden_size=262144", "model.num_heads=4096", "model.intermediate_size=1048576")
    assert train(config, "huge", *huge) == 78
    assert "does not fit" in the_error(capsys)
    written = json.loads((config.parent / "huge" / "STATUS.json").read_text())
    assert written["reason"] == "failed" and written["state_fingerprint"] is None


def test_an_allocation_that_is_really_too_large(config: Path) -> None:
    """What jax itself raises on this machine is recognised and explained; other errors are left alone."""
    from bertgpt_jax.config import load_config

    run = load_config(str(config), RunConfig, [])
    program = setup.make_program(run, make_mesh(run.execution.mesh))
    with pytest.raises(Exception) as caught:
        jax.block_until_ready(jax.jit(lambda: jax.numpy.ones((1 << 46,), "float32"))())
    assert memory.is_out_of_memory(caught.value), caught.value
    found = memory.explained(caught.value, program, run.stages[0])
    assert isinstance(found, memory.OutOfMemory) and found.__cause__ is caught.value
    other = ValueError("RESOURCE_EXHAUSTED")
    assert memory.explained(other, program, run.stages[0]) is other


def test_the_memory_of_this_machine() -> None:
    import psutil

    have = memory.available_bytes(jax.devices()[0])
    assert 0 < have * jax.local_device_count() <= psutil.virtual_memory().total
