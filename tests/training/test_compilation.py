"""Compiling beside the preparation of data: when it begins, what a wrong guess leads to, that it says nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import jax
import pytest

from bertgpt_jax.commands.train import main
from bertgpt_jax.config import load_config
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.training import compilation, memory, run, setup
from bertgpt_jax.training.ahead import stated_vocabulary
from bertgpt_jax.training.compilation import Compiler
from bertgpt_jax.training.run_config import RunConfig, with_vocabulary

TINY = str(Path(__file__).parent.parent / "faults" / "tiny.py")
STATED = 256
PATIENCE = 120
"""Seconds until a test gives up waiting."""


class Steps:
    """In place of what lowers and compiles: which vocabularies got how far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.lowered: list[tuple[str, int]] = []
        self.compiled: list[tuple[str, int]] = []
        self.began, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()
        monkeypatch.setattr(setup, "lower_train_step", lambda program, shape: self.lower("train", program))
        monkeypatch.setattr(setup, "lower_eval_step", lambda program, shape: self.lower("eval", program))
        monkeypatch.setattr(memory, "check", lambda *_: None)

    def lower(self, kind: str, program: setup.Program) -> Lowered:
        what = kind, program.config.model.vocab_size
        self.lowered.append(what)
        self.began.set()
        assert self.may_go_on.wait(PATIENCE)
        return Lowered(self, what)


class Lowered:
    def __init__(self, steps: Steps, what: tuple[str, int]):
        self.steps, self.what = steps, what

    def compile(self) -> tuple[str, int]:
        self.steps.compiled.append(self.what)
        return self.what


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


@pytest.fixture
def config() -> RunConfig:
    """Two stages; no vocabulary but the tokenizer's."""
    config = load_config(TINY, RunConfig, [])
    assert config.model.vocab_size is None and stated_vocabulary(config) == STATED
    return config


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_lowering_begins_before_the_corpus_is_open(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Opened(Exception):
        pass

    def open_corpus(*_: object) -> None:
        assert steps.began.wait(PATIENCE), "nothing was lowered while the corpus was awaited"
        raise Opened

    monkeypatch.setattr(run, "open_run_corpus", open_corpus)
    assert main([TINY, "corpus.path=none.txt", "--workdir", str(tmp_path / "run")]) == 70  # `Opened`
    assert steps.lowered[0] == ("train", STATED)


def test_a_right_guess_is_what_the_run_gets(steps: Steps, config: RunConfig) -> None:
    with Compiler(one_device()) as compiler:
        compiler.start_early(config)
        guessed = compiler.program
        assert compiler.start(with_vocabulary(config, STATED)) and compiler.program is guessed
        found = compiler.steps(0, lambda _: None)
    assert [(list(programs.values()), evaluation) for programs, evaluation in found] == [
        ([("train", STATED)], ("eval", STATED))
    ] * 2
    assert sorted(steps.compiled) == sorted(steps.lowered) == [("eval", STATED)] * 2 + [("train", STATED)] * 2


def test_a_wrong_guess_ends_in_the_right_program(steps: Steps, config: RunConfig) -> None:
    """What was being traced is not compiled, and what runs does not wait for it."""
    steps.may_go_on.clear()
    with Compiler(one_device()) as compiler:
        compiler.start_early(config)
        assert steps.began.wait(PATIENCE) and steps.lowered == [("train", STATED)]
        compiler.start(with_vocabulary(config, 100))
        steps.may_go_on.set()
        found = compiler.steps(0, lambda _: None)
        assert compiler.program.config.model.vocab_size == 100
    assert compiler.program.abstract_state["params"]["token_embedding"]["table"].shape[0] == 100
    assert all(set(programs.values()) == {("train", 100)} and e == ("eval", 100) for programs, e in found)
    assert {size for _, size in steps.compiled} == {100}


def test_what_a_guess_would_raise_or_warn_of_is_left_to_the_truth(
    steps: Steps, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned = []
    monkeypatch.setattr(setup, "warn_fp8", lambda *_: warned.append(1))
    mesh = make_mesh(MeshConfig(data=1, tensor=4), jax.devices()[:4])
    tree = config.model_dump(mode="json")
    tree["corpus"]["tokenizer"]["vocab_size"] = 255
    with Compiler(mesh) as compiler:
        compiler.start_early(RunConfig.model_validate(tree))
        assert compiler.program is None and not steps.lowered and not warned
        assert compiler.start(with_vocabulary(config, STATED)) and len(warned) == 1


def test_several_processes_do_not_guess(steps: Steps, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation.jax, "process_count", lambda: 2)
    with Compiler(one_device()) as compiler:
        compiler.start_early(config)
        assert compiler.program is None


def test_a_published_vocabulary_is_looked_at(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n")
    tree = config.model_dump(mode="json")
    for path, size in ((tmp_path / "vocab.txt", 7), (tmp_path / "none.txt", None), ("gs://bucket/vocab.txt", None)):
        tree["corpus"]["tokenizer"]["path"] = str(path)
        assert stated_vocabulary(RunConfig.model_validate(tree)) == size
