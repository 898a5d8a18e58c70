"""A run of a mixture along ramps of batch size and length: its numbers, its resume, its schedule that grows."""

from __future__ import annotations

import json
import random
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from bertgpt_jax.batches.ramp import batch_ramp
from bertgpt_jax.commands import evaluate
from bertgpt_jax.commands.train import main
from bertgpt_jax.config import load_config, to_json
from bertgpt_jax.corpus.config import CharactersConfig, CorpusConfig, HashSplit
from bertgpt_jax.corpus.mixture import MixtureConfig, MixturePart, WeightsFrom, open_any
from bertgpt_jax.errors import DataError
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.training import setup
from bertgpt_jax.training.data import check_enough
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig, with_changes, with_steps
from bertgpt_jax.training.schedules import Linear

STEPS = 10


def write(path: Path, letters: str, documents: int) -> str:
    rng = random.Random(letters)
    words = ["".join(rng.choices(letters, k=4)) for _ in range(40)]
    path.write_text("\n\n".join(" ".join(rng.choices(words, k=30)) for _ in range(documents)))
    return str(path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`config.json`: steps 0-2 of 8 x 8, 3-5 of 16 x 8, 6-9 of 16 x 16; other weights from step 4 on."""
    directory = tmp_path_factory.mktemp("mixed")
    own = {"held_out": HashSplit(fraction=0.2), "workers": 0, "sentences": "none"}
    paths = {"large": write(directory / "a.txt", "abcdefgh ", 60), "small": write(directory / "b.txt", "abcd ", 12)}
    parts = tuple(
        MixturePart(name=name, corpus=CorpusConfig(path=path, **own), weight=weight)
        for (name, path), weight in zip(paths.items(), (0.75, 0.25), strict=True)
    )
    schedule = (WeightsFrom(from_step=4, weights=(0.5, 0.5)),)
    stage = StageConfig(
        name="only",
        steps=STEPS,
        sequence_length=16,
        batch_size=16,
        batch_ramp=((0, 8), (3, 16)),
        length_ramp=((0, 8), (6, 16)),
        schedule=Linear(peak=1e-2, warmup_steps=2, total_steps=20),
    )
    config = RunConfig(
        corpus=MixtureConfig(parts=parts, schedule=schedule, tokenizer=CharactersConfig()),
        model=GptConfig(num_layers=1, hidden_size=16, num_heads=2, intermediate_size=32, max_positions=16),
        objective=CausalLM(),
        stages=(stage,),
        execution=ExecutionConfig(
            mesh=MeshConfig(),
            compute=ComputeConfig(unroll_layers=False),
            log_every=1,
            eval_every=5,
            eval_batches=1,
            save_every=5,
        ),
    )
    (directory / "config.json").write_text(to_json(config))
    return directory


def train(directory: Path, name: str, *changes: str) -> int:
    return main([str(directory / "config.json"), *changes, "--workdir", str(directory / name)])


def rows(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]


def status(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / name / "STATUS.json").read_text()) | {"time": 0}


@pytest.fixture(scope="module")
def whole(directory: Path) -> str:
    """An undisturbed run."""
    assert train(directory, "whole") == 0
    return "whole"


@pytest.fixture(scope="module")
def begun(directory: Path) -> Callable[[str], Path]:
    """Copies the workdir of a run of 5 steps, which saved the last, to a name."""
    assert train(directory, "begun", "stages.only.steps=5") == 0

    def copy(name: str) -> Path:
        return Path(shutil.copytree(directory / "begun", directory / name))

    return copy


@pytest.mark.slow
def test_what_is_counted(directory: Path, whole: str) -> None:
    found = rows(directory, whole)
    assert [row["train/tokens_seen"] for row in found] == [64, 128, 192, 320, 448, 576, 832, 1088, 1344, 1600]
    assert [row["data/small/rows"] for row in found] == [2, 4, 6, 10, 18, 26, 34, 42, 50, 58]
    assert [row["data/large/rows"] for row in found] == [6, 12, 18, 30, 38, 46, 54, 62, 70, 78]
    for name in ("large", "small"):
        tokens = [row[f"data/{name}/tokens"] for row in found]
        assert tokens[5] == found[5][f"data/{name}/rows"] * 8
        assert tokens[9] == tokens[5] + 4 * 8 * 16
        assert 0 < found[-1][f"data/{name}/epochs"] < 3
    rates = [row["optim/learning_rate"] for row in found]
    assert rates[0] == pytest.approx(5e-3) and max(rates) == rates[1] and rates[1:] == sorted(rates[1:], reverse=True)
    last = found[-1]
    assert min(last["eval/large/loss"], last["eval/small/loss"]) <= last["eval/loss"]
    assert last["eval/loss"] <= max(last["eval/large/loss"], last["eval/small/loss"])
    assert last["train/loss"] < found[0]["train/loss"]


@pytest.mark.slow
def test_a_resume_in_the_middle_of_the_ramps(
    directory: Path, whole: str, begun: Callable, capsys: pytest.CaptureFixture
) -> None:
    """Bit for bit the run that was never stopped."""
    begun("resumed")
    assert train(directory, "resumed") == 0
    said = capsys.readouterr().out
    assert "resumed at step 5" in said and "batch 8 x 8 -> 16 x 8 -> 16 x 16" in said
    assert "compiled batch 8 x 8" not in said and "compiled batch 16 x 8" in said and "compiled batch 16 x 16" in said
    assert (directory / "resumed" / "metrics.jsonl").read_bytes() == (directory / whole / "metrics.jsonl").read_bytes()
    assert status(directory, "resumed") == status(directory, whole)


def schedule(*entries: tuple[int, list[float]]) -> str:
    return "corpus.schedule=" + json.dumps([{"from_step": step, "weights": weights} for step, weights in entries])


@pytest.mark.slow
def test_the_schedule_grows_on_a_resume(
    directory: Path, whole: str, begun: Callable, capsys: pytest.CaptureFixture
) -> None:
    first, identity = (4, [0.5, 0.5]), (begun("grown") / "identity.json").read_bytes()
    capsys.readouterr()
    for bad, shown in (
        (schedule(first, (4, [0.1, 0.9])), "4, 4"),
        (schedule((3, [0.5, 0.5])), "corpus.schedule.0.from_step: 4 -> 3"),
        (schedule((4, [0.25, 0.75]), (8, [1, 0])), "corpus.schedule.0.weights.0: 0.5 -> 0.25"),
        (schedule(), "corpus.schedule.0: "),
    ):
        assert train(directory, "grown", bad) == 78
        assert shown in capsys.readouterr().err
    assert (directory / "grown" / "identity.json").read_bytes() == identity
    assert train(directory, "grown", schedule(first, (7, [0.0, 1.0]))) == 0
    assert "added: corpus.schedule.1: None -> {'from_step': 7" in capsys.readouterr().out
    ours, theirs = rows(directory, "grown"), rows(directory, whole)
    assert ours[:7] == theirs[:7]
    assert [row["data/large/rows"] for row in ours[6:]] == [54, 54, 54, 54]
    assert ours[-1]["train/loss"] != theirs[-1]["train/loss"]
    # now that step 10 is done, an entry for step 9 would rewrite what was trained on
    late = schedule(first, (7, [0.0, 1.0]), (9, [1.0, 0.0]))
    assert train(directory, "grown", late) == 78
    assert "corpus.schedule.2" in (said := capsys.readouterr().err) and "step 10 or later" in said


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_part_by_part(directory: Path, whole: str, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert evaluate.main([str(directory / whole), "--batches", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    logged = rows(directory, whole)[-1]
    for name in ("loss", "large/loss", "small/loss", "bits_per_byte", "small/accuracy"):
        assert result["metrics"][name] == pytest.approx(logged[f"eval/{name}"], rel=1e-4), name
    assert evaluate.main([str(directory / whole), "--corpus", "medium=/tmp"]) == 78
    assert "'medium'" in (said := capsys.readouterr().err) and "large, small" in said


# ---------------------------------------------------------------- what is known before


def test_the_dry_run_shows_the_ramp(directory: Path, capsys: pytest.CaptureFixture) -> None:
    assert train(directory, "none", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "only: 10 steps, 1,600 tokens" in said
    for line in ("step 0: batch 8 x 8, after 0", "step 3: batch 16 x 8, after 192", "step 6: batch 16 x 16, after 576"):
        assert line in said


@pytest.mark.parametrize("devices", [1, 8])
def test_microbatches_along_a_ramp(devices: int) -> None:
    """Never more positions at once than at the full batch, and every device has rows of each."""
    ramp = batch_ramp(((0, 16), (2.4e9, 320), (4.8e9, 624), (12e9, 1536)), 2048)
    stage = StageConfig(steps=10, sequence_length=2048, batch_size=1536, batch_ramp=ramp, microbatches=48)
    program = types.SimpleNamespace(mesh=make_mesh(MeshConfig(), jax.devices()[:devices]))
    shapes = [setup.shape_config(program, stage, segment) for segment in stage.ramp().segments]
    assert [(shape.batch_size, shape.microbatches) for shape in shapes] == [
        (16, 1), (320, 10), (624, 24 if devices == 1 else 26), (1536, 48),
    ]  # fmt: skip
    assert {shape.ramp().segments[0].first for shape in shapes} == {0}
    longer = StageConfig(steps=10, sequence_length=64, batch_size=16, length_ramp=((0, 128), (5, 64)), microbatches=2)
    first = setup.shape_config(program, longer, longer.ramp().segments[0])
    assert (first.sequence_length, first.microbatches) == (128, 4 if devices == 1 else 2)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, code, shown",
    [
        (["corpus.when_exhausted=error", "stages.only.steps=2000"], 65,
         ["runs out at step", "read 1 times", "when_exhausted=wrap"]),
        (["stages.only.batch_ramp=[[0,8],[3,12]]", "stages.only.batch_size=12"], 78,
         ["stages.only.batch_size 12", "use 8 or 16"]),
        (["stages.only.batch_ramp=[[1,8],[3,16]]"], 78, ["batch_ramp", "[1, 3]", "begin with 0"]),
        (["stages.only.batch_ramp=[[0,8],[3,8]]"], 78, ["batch_ramp", "ends with 8", "16"]),
        (["stages.only.length_ramp=[[0,4],[3,16]]"], 78, ["length_ramp", "4", "at least 8"]),
        (["stages.only.length_ramp=[[0,64],[3,16]]"], 78, ["sequence_length 64", "max_positions 16"]),
        (["corpus.parts.small.weight=0", "corpus.parts.large.weight=1", "corpus.schedule=[]"], 78,
         ["'small'", "weight 0"]),
        (["corpus.parts.small.weight=-1"], 78, ["corpus.parts.1.weight = '-1'", "0"]),
        (["corpus.parts.small.weight=0.5"], 78, ["1.25", "total = 1"]),
        (["corpus.schedule.0.weights=[0.5,0.4]"], 78, ["step 4", "0.9", "total = 1"]),
        (["corpus.schedule.0.weights=[1.0]"], 78, ["step 4", "are 1, the parts of the mixture 2"]),
        (["corpus.parts.small.name=large"], 78, ["two parts", "'large'"]),
        (["corpus.parts.small.epochs=2"], 78, ["'small'", "one of weight and epochs"]),
        (["corpus.parts.small.weight=null", "corpus.parts.small.epochs=2"], 78, ["all of them epochs"]),
        (["corpus.parts.small.corpus.tokenizer.kind=byte_bpe"], 78, ["'small'", "byte_bpe", "corpus.tokenizer"]),
        (["corpus.kind=mixed"], 78, ["corpus.kind = 'mixed'", "'mixture'", "known: single"]),
        (["corpus.parts.small.corpus.path=/none.txt"], 78, ["/none.txt", "no such file"]),
    ],
)  # fmt: skip
def test_refused_before_anything_is_compiled(
    directory: Path, changes: list[str], code: int, shown: list[str], monkeypatch, capsys
) -> None:
    monkeypatch.setattr(setup, "lower_train_step", lambda *_: pytest.fail("compiled"))
    assert train(directory, "refused", *changes) == code
    error = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert error.startswith("error: ") and [part for part in shown if part not in error] == [], error
    assert not (directory / "refused").exists()


def test_exactly_enough_is_enough(directory: Path) -> None:
    """Parts read a whole number of times: the last batch alone is filled up."""
    config = load_config(str(directory / "config.json"), RunConfig)
    tree = config.model_dump(mode="json")
    for part, epochs in zip(tree["corpus"]["parts"], (1, 3), strict=True):
        part |= {"weight": None, "epochs": epochs}
    tree["corpus"] |= {"schedule": [], "when_exhausted": "error"}
    tree["stages"][0] |= {"steps": None, "epochs": 1, "length_ramp": [], "batch_ramp": []}
    config = with_changes(config, {"corpus": tree["corpus"], "stages": tree["stages"]})
    corpus = open_any(config.corpus, directory / "corpora", progress=False)
    train, _ = setup.make_datasets(config, corpus, directory)[0]
    data = train.data[16]
    sizes = {name: part.rows_per_epoch() for name, part in data.parts.items()}
    assert data.rows_per_epoch() == sizes["large"] + 3 * sizes["small"]
    assert data.seen(data.rows_per_epoch()) == {"large": sizes["large"], "small": 3 * sizes["small"]}
    steps = with_steps(config, [train.rows_per_epoch]).stages[0].steps
    assert steps == -(-data.rows_per_epoch() // 16)
    check_enough(config.corpus, [train], [steps])
    with pytest.raises(DataError, match=f"runs out at step {steps - 1}, having been read"):
        check_enough(config.corpus, [train], [steps + 3])
