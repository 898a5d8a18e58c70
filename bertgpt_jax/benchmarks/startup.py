"""Benchmark `startup`: from the start of a training process to the end of its first step, with and without a cache.

Each start is a whole `train` in a process of its own, on a corpus that is there: imports, the corpus opened, parameters
drawn, the programs compiled or read, a step. It ends when its first row is printed; the process is then killed.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from pydantic import Field

from bertgpt_jax.benchmarks.harness import Result, Row, summary
from bertgpt_jax.benchmarks.processes import TRAIN, started
from bertgpt_jax.config import Config, to_json
from bertgpt_jax.corpus.config import CorpusConfig, HashSplit, WordPieceConfig
from bertgpt_jax.errors import DataError
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig

WARM_OVER_COLD = 0.4


class Settings(Config):
    """Settings of the benchmark; the shapes are those of BERT-base, the rows few."""

    layers: int = Field(default=12, ge=1)
    hidden: int = Field(default=768, ge=8)
    heads: int = Field(default=12, ge=1)
    vocabulary: int = Field(default=30_522, ge=110)
    length: int = Field(default=128, ge=16)
    rows: int = Field(default=4, ge=1)
    rounds: int = Field(default=3, ge=1, description="starts of each kind")
    timeout: float = Field(default=300.0, gt=0, description="seconds that a start may take")


def run(settings: Settings) -> Result:
    """Starts scanned and unrolled runs by turns, each first without and then with what the start before it compiled."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        _write_text(root / "text.txt")
        for loop in ("scan", "unrolled"):
            config = _config(settings, root, unroll=loop == "unrolled")
            (root / f"{loop}.json").write_text(to_json(config))
        _first_step(root, "scan", root / "unused", settings)  # the corpus is prepared
        for _ in range(settings.rounds):
            for loop in ("scan", "unrolled"):
                cache = root / f"programs-{loop}"
                shutil.rmtree(cache, ignore_errors=True)
                for start in ("cold", "warm"):
                    seconds.setdefault(f"{loop}, {start}", []).append(_first_step(root, loop, cache, settings))
    return _result(settings, seconds)


def _result(settings: Settings, seconds: dict[str, list[float]]) -> Result:
    """Median seconds of each kind of start; of warm over cold, the median over the rounds, each of which has a pair."""
    columns = {name: np.array(values) for name, values in seconds.items()}
    shape = f"BERT L{settings.layers} D{settings.hidden} V{settings.vocabulary} S{settings.length} B{settings.rows}"
    rows = [
        Row(f"{shape}, process start to first step done: {name}", float(np.median(values)), "s")
        for name, values in columns.items()
    ]
    comparisons = {}
    for loop in ("scan", "unrolled"):
        cold, warm = f"{loop}, cold", f"{loop}, warm"
        comparisons[loop] = found = summary({cold: columns[cold], warm: columns[warm]}, 0)
        rows.append(Row(f"{shape}, {loop}: warm over cold", found["paired"][warm]["median"], "x", most=WARM_OVER_COLD))
    return Result(tuple(rows), comparisons, {}, {"seconds": seconds})


def _config(settings: Settings, root: Path, unroll: bool) -> RunConfig:
    return RunConfig(
        corpus=CorpusConfig(
            path=str(root / "text.txt"), sentences="line", held_out=HashSplit(fraction=0.1),
            tokenizer=WordPieceConfig(vocab_size=80), workers=0,
        ),
        model=BertConfig(
            num_layers=settings.layers, hidden_size=settings.hidden, num_heads=settings.heads,
            intermediate_size=4 * settings.hidden, vocab_size=settings.vocabulary,
        ),
        objective=MaskedLMNSP(),
        stages=(StageConfig(steps=1000, sequence_length=settings.length, batch_size=settings.rows),),
        execution=ExecutionConfig(compute=ComputeConfig(unroll_layers=unroll), log_every=1),
    )  # fmt: skip


def _write_text(path: Path) -> None:
    """Documents of a few short sentences."""
    rng = np.random.default_rng(0)
    words = "the cat sat on mats while some dogs ran after every bird they saw near old walls".split()
    documents = ["\n".join(" ".join(rng.choice(words, 12)) + "." for _ in range(20)) for _ in range(200)]
    path.write_text("\n\n".join(documents))


def _first_step(root: Path, name: str, cache: Path, settings: Settings) -> float:
    """Seconds from starting a process to the row of its first step; the process and what it wrote are removed.

    Raises:
        DataError: it ended before that, or took too long.
    """
    workdir = root / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    command = [sys.executable, "-c", TRAIN, str(root / f"{name}.json"), "--workdir", str(workdir), "--platform", "cpu"]
    command.append(f"execution.compilation_cache={cache}")
    begun, last = time.perf_counter(), "it said nothing"
    with started(command, settings.timeout) as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                return time.perf_counter() - begun
            last = line.strip() or last
    raise DataError(f"a run ended or was cut off before its first step: {last}")
