"""Trained models leave: transformers, in a process of its own, has the same held-out loss and continues alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bertgpt_jax.corpus.reader import CorpusReader
from bertgpt_jax.evaluation.workdir import evaluate_workdir
from bertgpt_jax.generation.continuation import Continuation
from bertgpt_jax.generation.decode import GptDecoder
from bertgpt_jax.generation.sampling import Sampling
from bertgpt_jax.training.data import make_held_out
from bertgpt_jax.transfer.export import export_hf
from bertgpt_jax.transfer.initial import begun_config
from bertgpt_jax.transfer.load import load_model, open_source

pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[parity]'")
pytest.importorskip("transformers", reason="transformers is not installed; pip install -e '.[parity]'")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

BATCHES = 3


def ask_transformers(directory: Path, workdir: Path, prompt: np.ndarray | None, batches: int = BATCHES) -> dict:
    """What `theirs.py` says of an export, for the first held-out batches of the run."""
    config = begun_config(str(workdir))
    corpus = CorpusReader(json.loads((workdir / "corpus.json").read_text())["path"])
    stage = len(config.stages) - 1
    held_out = make_held_out(config, stage, corpus, directory.parent)
    arrays = {} if prompt is None else {"prompt": prompt}
    for i in range(min(batches, held_out.eval_batches())):
        arrays |= {f"{i}/{name}": array for name, array in held_out.eval_batch(i).items()}
    given = directory.parent / "batches.npz"
    np.savez(given, **arrays)
    command = [sys.executable, str(Path(__file__).with_name("theirs.py")), str(directory), str(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def compare(workdir: Path, directory: Path, prompt: np.ndarray | None = None, batches: int = BATCHES) -> dict:
    """Exports, asks, and compares losses and tokens; returns what transformers said."""
    source = open_source(str(workdir), "latest")
    export_hf(source, str(directory), reference="numpy")
    theirs = ask_transformers(directory, workdir, prompt, batches)
    ours = evaluate_workdir(str(workdir), "latest", batches=batches)["metrics"]
    assert not any(theirs["report"].values())
    for name, value in theirs["losses"].items():
        print(f"{name}: ours {ours[name]:.9f}, theirs {value:.9f}, {abs(ours[name] - value):.1e} apart")
        assert abs(ours[name] - value) <= 1e-5, name
    assert theirs["tokens"] == source.tokenizer.encode("To be, or not to be").tolist()
    return theirs


def train(*argv: str) -> None:
    """A run in a process with one device: eight would compile for a minute."""
    program = "import sys; from bertgpt_jax.commands.train import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}
    )
    assert done.returncode == 0, done.stderr


def greedy(workdir: Path, prompt: np.ndarray) -> list[int]:
    """Our own continuation by 50 tokens."""
    loaded = load_model(str(workdir), "latest")
    decoder = GptDecoder(loaded.model_config, loaded.model_config.vocab_size)
    run = Continuation(decoder, decoder.layout(loaded.params), Sampling(temperature=0.0), max_new=50)
    return run.run([prompt])[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Python's grammar of itself: enough to learn letters from."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(json.decoder.__file__).read_text() + Path(os.__file__).read_text())
    return path


def test_a_gpt_of_shakespeares_characters(shared_data, tmp_path) -> None:
    text = shared_data / "lm" / "tinyshakespeare" / "input.txt.gz"
    argv = ["gpt/shakespeare_char", f"corpus.path={text}", "stages.0.steps=60", "stages.0.schedule.warmup_steps=10"]
    argv += ["model.hidden_size=48", "model.num_heads=3", "model.intermediate_size=96", "model.num_layers=2"]
    argv += [
        "stages.0.batch_size=8",
        "corpus.workers=0",
        "execution.eval_batches=3",
        "--workdir",
        str(tmp_path / "run"),
    ]
    train(*argv)
    prompt = load_model(str(tmp_path / "run")).tokenizer.encode("ROMEO:\n")
    theirs = compare(tmp_path / "run", tmp_path / "hf", prompt)
    assert theirs["continuation"] == greedy(tmp_path / "run", prompt)


def test_a_bert_of_word_pieces(text, tmp_path) -> None:
    argv = ["quickstart", f"corpus.path={text}", "stages.phase1.steps=20", "stages.phase2.steps=5", "corpus.workers=0"]
    argv += ["corpus.tokenizer.vocab_size=700", "corpus.held_out.fraction=0.2", "stages.phase1.batch_size=8"]
    argv += ["stages.phase2.batch_size=8", "execution.eval_batches=3", "stages.phase1.schedule.warmup_steps=5"]
    argv += ["stages.phase2.schedule.warmup_steps=5", "--workdir", str(tmp_path / "run")]
    train(*argv)
    compare(tmp_path / "run", tmp_path / "hf")
