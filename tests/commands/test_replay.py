"""`tools/replay.py`: what a step was made of, for every kind of example, any step, rows and process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from bertgpt_jax.batches.packing import PackedPairs
from bertgpt_jax.commands.replay import main
from bertgpt_jax.corpus.config import CorpusConfig, HashSplit, WordPieceConfig
from bertgpt_jax.corpus.mixture import MixtureConfig, MixturePart, open_any
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm import MaskedLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.training import setup
from bertgpt_jax.training.run_config import RunConfig, StageConfig, with_vocabulary
from bertgpt_jax.training.workdir import write_description

WORDS = "the cat sat on a mat while some dogs ran after every bird they saw near old stone walls".split()
LENGTH, ROWS = 64, 8
TOKENIZER = WordPieceConfig(vocab_size=87)  # every word is one piece


def write(path: Path, seed: int, documents: int) -> Path:
    """Documents of three to seven sentences, a sentence a line, blank lines between them."""
    rng = random.Random(seed)
    texts = ["\n".join(" ".join(rng.choices(WORDS, k=rng.randint(4, 9))) for _ in range(rng.randint(3, 7)))]
    texts += ["\n".join(" ".join(rng.choices(WORDS, k=7)) for _ in range(rng.randint(3, 7))) for _ in range(documents)]
    path.write_text("\n\n".join(texts))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("replay")
    write(directory / "one.txt", 1, 60)
    write(directory / "two.txt", 2, 40)
    return directory


def corpus_config(path: Path) -> CorpusConfig:
    split = HashSplit(fraction=0.1)
    return CorpusConfig(path=str(path), sentences="line", held_out=split, tokenizer=TOKENIZER, workers=0)


def objective(kind: str) -> Any:
    return {
        "windows": CausalLM(),
        "full_documents": MaskedLM(),
        "pairs": MaskedLMNSP(),
        "packed_pairs": MaskedLMNSP(examples=PackedPairs()),
        "mixture": MaskedLMNSP(),
    }[kind]


@pytest.fixture(scope="module")
def workdir(sources: Path) -> Any:
    """workdir(kind): the description of a run of two stages (4 and 6 steps), as `train` writes it, and its datasets."""

    def make(kind: str) -> tuple[Path, list]:
        corpus = corpus_config(sources / "one.txt")
        if kind == "mixture":
            parts = tuple(
                MixturePart(name=name, corpus=corpus_config(sources / f"{name}.txt"), weight=0.5)
                for name in ("one", "two")
            )
            corpus = MixtureConfig(parts=parts, tokenizer=TOKENIZER)
        small = dict(num_layers=1, hidden_size=16, num_heads=2, intermediate_size=16, max_positions=LENGTH)
        config = RunConfig(
            seed=3,
            corpus=corpus,
            model=GptConfig(**small) if kind == "windows" else BertConfig(**small),
            objective=objective(kind),
            stages=tuple(
                StageConfig(name=n, steps=s, sequence_length=LENGTH, batch_size=ROWS) for n, s in (("a", 4), ("b", 6))
            ),
        )
        reader = open_any(config.corpus, sources / "corpora", progress=False)
        config = with_vocabulary(config, reader.vocab_size)
        path = sources / kind
        path.mkdir(exist_ok=True)
        write_description(epath.Path(path), config, {}, reader)
        return path, [train for train, _ in setup.make_datasets(config, reader, sources / "corpora")]

    return make


def replayed(capsys: pytest.CaptureFixture, *arguments: str) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["windows", "full_documents", "pairs", "packed_pairs", "mixture"])
def test_documents_text_and_masks_are_those_of_the_batch(kind: str, workdir, sources: Path, capsys) -> None:
    path, datasets = workdir(kind)
    found = replayed(capsys, path, "--step", 6)
    assert (found["stage"], found["batch"], found["batch_size"]) == ("b", 1, ROWS) and len(found["rows"]) == ROWS
    batch = datasets[1].batch(1)
    for r, row in enumerate(found["rows"]):
        name = row.get("corpus", "one")
        text, spans = (sources / f"{name}.txt").read_bytes(), []
        for place in row["documents"]:
            assert Path(place["source"]).name == f"{name}.txt"
            whole = text[place["offset"] :].decode().partition("\n\n")[0].split()
            words = place["text"].split()
            spans += words
            begin = [i for i in range(len(whole)) if whole[i : i + len(words)] == words]
            assert begin, f"{words} is not in the document that begins at {place['offset']}"
        inside = [w for w in row["text"].split() if not w.startswith("[")]
        assert inside == spans, "the row's text is that of its documents"
        if kind == "windows":
            continue
        places = np.flatnonzero(batch["mask_weights"][r])
        assert [m["position"] for m in row["masks"]] == batch["mask_positions"][r][places].tolist()
        assert {m["kind"] for m in row["masks"]} <= {"mask", "random", "kept"}
        assert row["input"].count("[MASK]") == sum(m["kind"] == "mask" for m in row["masks"])
        if kind in ("pairs", "mixture"):
            assert row["next_labels"] == [batch["next_labels"][r]]
    if kind == "packed_pairs":
        assert max(row.get("segments", 1) for row in found["rows"]) > 1
        assert all(len(row["next_labels"]) == row.get("segments", 1) for row in found["rows"])
    if kind == "mixture":
        assert {row["corpus"] for row in found["rows"]} == {"one", "two"}


def test_processes_and_rows_are_parts_of_the_same_batch(workdir, capsys) -> None:
    path, _ = workdir("pairs")
    whole = replayed(capsys, path, "--step", 3)["rows"]
    parts = [replayed(capsys, path, "--step", 3, "--process", f"{i}/4")["rows"] for i in range(4)]
    assert sum(parts, []) == whole
    assert replayed(capsys, path, "--step", 3, "--rows", "6,1-2")["rows"] == [whole[6], whole[1], whole[2]]


def test_as_text(workdir, capsys) -> None:
    path, _ = workdir("pairs")
    assert main([str(path), "--step", "1", "--rows", "0"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"step 1: batch 0 of stage a, {ROWS} rows of {LENGTH}"
    assert "B random: " in printed[1] and "one.txt at " in printed[2] and "-> [MASK]" in "".join(printed)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--step", "0"], 78, "steps 1..10 (a 4, b 6)"),
        (["--step", "11"], 78, "--step 11"),
        (["--step", "x"], 64, "x"),
        (["--step", "1", "--rows", "8"], 64, "--rows 8: the rows here are 0..7"),
        (["--step", "1", "--rows", "5-2"], 64, "'5-2'"),
        (["--step", "1", "--process", "3"], 64, "--process '3'"),
        (["--step", "1", "--process", "1/3"], 64, "n divides the 8 rows"),
        (["--step", "1", "--process", "4/4"], 64, "--process 4/4"),
        (["--step", "1", "--process", "1/2", "--rows", "0"], 64, "the rows here are 4..7"),
    ],
)
def test_bad_arguments(workdir, capsys, arguments: list[str], code: int, words: str) -> None:
    path, _ = workdir("pairs")
    assert main([str(path), *arguments]) == code
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_what_is_no_workdir_or_another_corpus(workdir, sources: Path, tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path), "--step", "1"]) == 78
    assert "is not the workdir of a run" in capsys.readouterr().err
    path, _ = workdir("pairs")
    other = open_any(corpus_config(sources / "two.txt"), sources / "corpora", progress=False)
    assert main([str(path), "--step", "1", "--corpus", str(other.path)]) == 65
    assert other.fingerprint[:12] in capsys.readouterr().err
