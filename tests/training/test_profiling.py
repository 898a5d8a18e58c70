"""The host's side of training: steps do not wait for it, programs are kept, traces are written."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bertgpt_jax.commands.train import main
from bertgpt_jax.config import to_json
from bertgpt_jax.corpus.config import CharactersConfig, CorpusConfig, PositionSplit
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.training import loop as loop_module
from bertgpt_jax.training import setup
from bertgpt_jax.training.metrics import MetricWriter
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT of one layer over characters, 12 steps, a row every 4."""
    directory = tmp_path_factory.mktemp("host")
    (directory / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    config = RunConfig(
        corpus=CorpusConfig(
            path=str(directory / "text.txt"),
            held_out=PositionSplit(fraction=0.1),
            tokenizer=CharactersConfig(),
            workers=0,
        ),
        model=GptConfig(
            num_layers=1, hidden_size=16, num_heads=2, intermediate_size=32, max_positions=16, **NO_DROPOUT
        ),
        objective=CausalLM(),
        stages=(StageConfig(name="only", steps=12, sequence_length=16, batch_size=8, schedule=Constant(peak=1e-2)),),
        execution=ExecutionConfig(compute=ComputeConfig(unroll_layers=False), log_every=4, eval_batches=2),
    )
    (directory / "config.json").write_text(to_json(config))
    return directory / "config.json"


def train(config: Path, name: str, *overrides: str) -> int:
    return main([str(config), *overrides, "--workdir", str(config.parent / name)])


def test_steps_are_dispatched_without_waiting_for_the_device(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are fetched for rows alone, and those of a step only once the next one was dispatched."""
    events: list[str] = []
    real_get, real_tick, real_lower = jax.device_get, MetricWriter.tick, setup.lower_train_step

    class Noting:
        def __init__(self, lowered):
            self._lowered = lowered

        def compile(self):
            compiled = self._lowered.compile()

            def step(state, batch):
                assert all(isinstance(x, jax.Array) for x in batch.values()), "placed before it is asked for"
                events.append("step")
                return compiled(state, batch)

            return step

    monkeypatch.setattr(setup, "lower_train_step", lambda *a: Noting(real_lower(*a)))
    monkeypatch.setattr("bertgpt_jax.training.memory.check", lambda *_: None)
    monkeypatch.setattr(jax, "device_get", lambda x: events.append("get") or real_get(x))
    monkeypatch.setattr(MetricWriter, "tick", lambda self, step: events.append(f"tick {step}") or real_tick(self, step))
    assert train(config, "async", "execution.log_every=4") == 0
    steps = events[: events.index("tick 12")]
    expected = []
    for step in range(1, 13):
        expected += ["step", *(["get"] if step in (5, 9) else []), f"tick {step}"]
    assert steps == expected[:-1], "rows of steps 4 and 8 are fetched after steps 5 and 9 began"


def test_a_transfer_between_batch_and_step_is_an_error(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop runs that stretch under a transfer guard: a batch left on the host does not slip through."""
    real = setup.lower_train_step

    class Copying:
        def __init__(self, lowered):
            self._lowered = lowered

        def compile(self):
            compiled = self._lowered.compile()
            return lambda state, batch: compiled(state, {k: jnp.asarray(jax.device_get(v)) for k, v in batch.items()})

    monkeypatch.setattr(setup, "lower_train_step", lambda *a: Copying(real(*a)))
    monkeypatch.setattr("bertgpt_jax.training.memory.check", lambda *_: None)
    assert train(config, "copying") == 70
    assert train(config, "copying2", "execution.log_every=1") == 70


def test_at_least_two_batches_are_on_the_device_before_they_are_asked_for(config: Path, monkeypatch) -> None:
    placed: list[int] = []
    ahead: list[int] = []
    real_place, real_tick = loop_module.place_batch, MetricWriter.tick
    monkeypatch.setattr(loop_module, "place_batch", lambda *a: placed.append(1) or real_place(*a))

    def tick(self: MetricWriter, step: int) -> None:
        import time

        for _ in range(200):  # the threads get their turn
            if len(placed) >= min(step + 2, 12):
                break
            time.sleep(0.01)
        ahead.append(len(placed) - step)
        real_tick(self, step)

    monkeypatch.setattr(MetricWriter, "tick", tick)
    assert train(config, "ahead") == 0
    assert all(n >= 2 for n in ahead[:10]), ahead


def test_a_window_of_the_config_and_one_asked_for_are_traced(config: Path, monkeypatch, capsys) -> None:
    real = MetricWriter.tick

    def tick(self: MetricWriter, step: int) -> None:
        real(self, step)
        if step == 7:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(MetricWriter, "tick", tick)
    before = signal.getsignal(signal.SIGUSR1)
    assert train(config, "traced", "execution.profile.first_step=2", "execution.profile.steps=2") == 0
    assert signal.getsignal(signal.SIGUSR1) == before
    out = capsys.readouterr().out
    assert re.findall(r"profiled steps (\d+) to (\d+): (\S+)", out) == [
        ("2", "3", str(config.parent / "traced" / "profile" / "step-2")),
        ("8", "9", str(config.parent / "traced" / "profile" / "step-8")),
    ]
    for window in ("step-2", "step-8"):
        assert list((config.parent / "traced" / "profile" / window).rglob("*.xplane.pb"))


def test_a_window_that_a_run_does_not_finish_is_kept(config: Path, capsys) -> None:
    assert train(config, "short", "execution.profile.first_step=11", "execution.profile.steps=50") == 0
    assert "profiled steps 11 to 12" in capsys.readouterr().out


def test_programs_are_kept_where_the_config_says(config: Path, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(jax.config, "update", lambda name, value: seen.__setitem__(name, value))
    seen: dict[str, object] = {}
    from etils import epath

    from bertgpt_jax.config import load_config
    from bertgpt_jax.training.workdir import use_compilation_cache

    chosen = load_config(str(config), RunConfig, [f"execution.compilation_cache={tmp_path / 'mine'}"])
    use_compilation_cache(chosen, epath.Path(tmp_path / "run"))
    assert (
        seen["jax_compilation_cache_dir"] == str(tmp_path / "mine") and (tmp_path / "mine").stat().st_mode & 0o77 == 0
    )
    (tmp_path / "file").write_text("")
    assert train(config, "nowhere", f"execution.compilation_cache={tmp_path / 'file' / 'x'}") in (74, 78)
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_profile_names_are_those_of_the_code(config: Path) -> None:
    """A trace says `layers/attention/query`, as the modules and parameters are called."""
    from bertgpt_jax.config import load_config
    from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh

    tree = load_config(str(config), RunConfig, ["model.vocab_size=40"])
    program = setup.make_program(tree, make_mesh(MeshConfig(), jax.devices()[:1]))
    # not the compiled text: the compilation cache would give names of before a change of names
    names = setup.lower_train_step(program, tree.stages[0]).as_text(debug_info=True)
    for words in (
        "layers/attention/query/",
        "layers/feed_forward/up/",
        "layers/attention/dot_product_attention/",
        "token_embedding",
        "optimizer[/)]",
        "cross_entropy[/)]",
    ):
        assert re.search(words, names), words
