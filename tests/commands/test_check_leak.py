"""`check_leak CONFIG`: a line for each attention path, exit code 0 or 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bertgpt_jax.commands import check_leak
from bertgpt_jax.config import to_json
from bertgpt_jax.corpus.config import CharactersConfig, CorpusConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.objectives import causal_lm
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.training.run_config import RunConfig, StageConfig

PACKED = "objective.examples.kind=packed_documents"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small GPT on 60 short documents, as a JSON file; the corpus is prepared once, beside it."""
    folder, rng = tmp_path_factory.mktemp("leak"), np.random.default_rng(0)
    documents = ["".join(rng.choice(list("abcdefgh "), rng.integers(3, 14))) + "." for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    corpus = CorpusConfig(path=str(folder / "text.txt"), tokenizer=CharactersConfig(), workers=0)
    sizes = dict(num_layers=1, hidden_size=8, num_heads=2, intermediate_size=16, max_positions=32)
    stage = StageConfig(steps=1, sequence_length=32, batch_size=4)
    run = RunConfig(corpus=corpus, model=GptConfig(**sizes), objective=CausalLM(), stages=(stage,))
    (folder / "config.json").write_text(to_json(run))
    return str(folder / "config.json")


def run(config: str, *more: str) -> int:
    return check_leak.main([config, "--corpora", str(Path(config).parent / "corpora"), *more])


def test_packed_documents_do_not_leak(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, PACKED) == 0
    lines = capsys.readouterr().out.splitlines()
    paths = check_leak.attention_paths()
    assert "reference" in paths and "auto" not in paths
    assert len(lines) == len(paths)
    assert all(": no leak; " in line or "not checked, this path cannot serve here (" in line for line in lines)
    (line,) = [line for line in lines if line.startswith("causal_lm, packed_documents, reference: ")]
    assert "no leak; 3 of " in line and "bit-identical" in line


def test_a_leak_ends_with_1_and_names_the_segments(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "causal_mask", lambda *_: AttentionMask(causal=True))
    assert run(config, PACKED) == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert "LEAK in 3 of 3 trials; perturbing row 0 segment " in line
    assert "hidden states of row 0 " in line and "gradient from the others' losses" in line


@pytest.mark.slow
def test_the_kernel_of_tpus_is_emulated(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["model.hidden_size=64", "model.num_heads=1", "model.max_positions=128", "stages.0.sequence_length=128"]
    assert run(config, PACKED, "--trials", "1", *sizes) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("causal_lm, packed_documents, splash (emulated): no leak; 1 of ")]
    assert [line for line in lines if "cudnn: not checked" in line and "it runs on gpu" in line]


@pytest.mark.slow
def test_windows_leak_by_design_and_say_so(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("causal_lm, windows, reference: no leak; 2 of 2 rows")
    assert last.startswith("windows leaks by design") and "packed_documents keeps them apart" in last


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--rows", "1"], 64, ["--rows 1", "at least 2"]),
        (["--trials", "0"], 64, ["--trials 0", "at least 1"]),
        (["second.json"], 64, ["'second.json'", "key=value"]),
        (["--stage", "phase9"], 78, ["'phase9'", "pretrain"]),
        (["objective.examples.kind=packed_pairs"], 78, ["packed_pairs", "known: windows, packed_documents"]),
        (["corpus.path="], 78, ["corpus"]),
    ],
)
def test_bad_input(config: str, arguments: list[str], code: int, message: list[str], capsys) -> None:
    assert run(config, *arguments) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in message), error
