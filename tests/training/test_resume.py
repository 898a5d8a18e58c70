"""The same command again: on another mesh, after damage, from an older step, with other settings, after the end."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bertgpt_jax.commands.train import main
from bertgpt_jax.config import load_config, to_json
from bertgpt_jax.training import loop
from bertgpt_jax.training.run_config import RunConfig

FAULTS = Path(__file__).parent.parent / "faults"
# reads of a damaged checkpoint that are abandoned report at any later moment, to an event loop that is gone
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

FIRST, LAST = 12, 32
"""Steps of the run that all others go on from, and of those."""


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"tests_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tests/faults/tiny.py` (dropout on) with one stage and a row every step, as JSON, beside its text."""
    directory = tmp_path_factory.mktemp("resume")
    text = _module(FAULTS / "conftest.py").write_text(directory / "text.txt")
    changes = ["execution.log_every=1", "execution.eval_every=4", "execution.eval_batches=1", f"corpus.path={text}"]
    tree = json.loads(to_json(load_config(str(FAULTS / "tiny.py"), RunConfig, changes)))
    tree["stages"] = tree["stages"][:1]
    (directory / "config.json").write_text(json.dumps(tree))
    return directory / "config.json"


def train(config: Path, name: str, *arguments: str, steps: int = LAST) -> int:
    """Exit code of the command."""
    return main([str(config), f"stages.short.steps={steps}", "--workdir", str(config.parent / name), *arguments])


def status(config: Path, name: str) -> dict[str, Any]:
    return json.loads((config.parent / name / "STATUS.json").read_text())


def rows(config: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.parent / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def copied(config: Path) -> Callable[[str], Path]:
    """Copies the workdir of a run of 12 steps, which has checkpoints 8 and 12, to a name."""
    assert train(config, "first", steps=FIRST) == 0

    def copy(name: str) -> Path:
        return Path(shutil.copytree(config.parent / "first", config.parent / name))

    return copy


@pytest.fixture(scope="module")
def whole(config: Path, copied: Callable[[str], Path]) -> dict[tuple[int, int], str]:
    """The run "whole" to its last step on the mesh it began with; its batches."""
    copied("whole")
    with pytest.MonkeyPatch.context() as patch:
        seen = watch_batches(patch)
        assert train(config, "whole") == 0
    return seen


def watch_batches(patch: pytest.MonkeyPatch) -> dict[tuple[int, int], str]:
    """(number, row) -> digest, filled by the runs that follow."""
    digests = _module(FAULTS / "faulty_train.py")._row_digests
    real, seen = loop.prefetch, {}

    def prefetch(build: Callable, start: int, stop: int, *rest: int) -> Any:
        for n, batch in zip(range(start, stop), real(build, start, stop, *rest), strict=True):
            seen.update({(n, row): digest for row, digest in digests(batch).items()})
            yield batch

    patch.setattr(loop, "prefetch", prefetch)
    return seen


@pytest.mark.slow
def test_another_mesh_and_logging(
    config: Path, copied: Callable, whole: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """(8) -> (2, 2, 2): the same batches and, dropout on, the same losses."""
    copied("mesh")
    seen = watch_batches(monkeypatch)
    mesh = [f"execution.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    assert train(config, "mesh", *mesh, "execution.log_every=2") == 0
    said = capsys.readouterr().out
    assert f"resumed at step {FIRST}" in said and "mesh data=2,fsdp=2,tensor=2" in said
    assert seen == whole and len(seen) == (LAST - FIRST) * 8
    reference = {row["step"]: row for row in rows(config, "whole")}
    ours = [row for row in rows(config, "mesh") if row["step"] > FIRST]
    assert [row["step"] for row in ours] == list(range(FIRST + 2, LAST + 1, 2))
    for row in ours:
        assert row["train/loss"] == pytest.approx(reference[row["step"]]["train/loss"], abs=1e-5, rel=0), row["step"]
    assert reference[LAST]["train/loss"] < reference[1]["train/loss"] - 0.1, "the losses should have moved"


def _damage(checkpoint: Path) -> None:
    """Flips one bit in the middle of each file of arrays (of one file alone, it may hit what nothing refers to)."""
    for path in (checkpoint / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)


def test_the_newest_checkpoint_is_damaged(
    config: Path, copied: Callable, whole: dict, caplog: Any, capsys: Any
) -> None:
    workdir = copied("damaged")
    _damage(workdir / "checkpoints" / str(FIRST))
    assert train(config, "damaged") == 0
    assert "resumed at step 8" in capsys.readouterr().out
    assert f"checkpoint of step {FIRST} is damaged" in caplog.text
    assert [p.name.split(".")[:2] for p in (workdir / "checkpoints").glob("bad.*")] == [["bad", str(FIRST)]]
    assert (workdir / "metrics.jsonl").read_bytes() == (config.parent / "whole" / "metrics.jsonl").read_bytes()
    assert {**status(config, "damaged"), "time": 0} == {**status(config, "whole"), "time": 0}


def test_all_checkpoints_are_damaged(config: Path, copied: Callable, capsys: pytest.CaptureFixture) -> None:
    """Never silently from scratch, and nothing is thrown away."""
    workdir = copied("lost")
    for checkpoint in (workdir / "checkpoints").iterdir():
        _damage(checkpoint)
    before = {p: p.read_bytes() for p in (workdir / "checkpoints").rglob("*") if p.is_file()}
    metrics = (workdir / "metrics.jsonl").read_bytes()
    assert train(config, "lost") == 65
    assert "every checkpoint in" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (workdir / "checkpoints").rglob("*") if p.is_file()} == before
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    assert not (workdir / "run.lock").exists()


def test_from_an_older_step(config: Path, copied: Callable, capsys: pytest.CaptureFixture) -> None:
    """The steps after it are done again, with the same bits; what was newer is set aside."""
    workdir = copied("older")
    assert train(config, "older", "--from-step", "8", steps=FIRST) == 0
    assert "resumed at step 8" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == (config.parent / "first" / "metrics.jsonl").read_bytes()
    assert status(config, "older")["state_fingerprint"] == status(config, "first")["state_fingerprint"]
    assert len(list((workdir / "checkpoints").glob(f"old.{FIRST}.*"))) == 1


def test_after_the_end_nothing_happens(config: Path, copied: Callable, capsys: pytest.CaptureFixture) -> None:
    workdir = copied("again")
    assert train(config, "again", steps=FIRST) == 0
    said = capsys.readouterr().out
    assert "nothing to do" in said and "compiled" not in said
    assert (workdir / "metrics.jsonl").read_bytes() == (config.parent / "first" / "metrics.jsonl").read_bytes()
    assert {**status(config, "again"), "time": 0} == {**status(config, "first"), "time": 0}


def test_a_workdir_whose_checkpoints_could_not_be_read_back(config: Path, capsys: pytest.CaptureFixture) -> None:
    assert train(config, "lr[1]") == 78
    error = capsys.readouterr().err
    assert "lr[1]" in error and "'['" in error and not (config.parent / "lr[1]").exists()


def test_another_identity(config: Path, copied: Callable, capsys: pytest.CaptureFixture) -> None:
    workdir = copied("identity")
    peak = "stages.short.schedule.peak"
    for change, shown in ((f"{peak}=0.02", "stages.0.schedule.peak: 0.01 -> 0.02"), ("seed=1", "seed: 0 -> 1")):
        assert train(config, "identity", change) == 78
        captured = capsys.readouterr()
        assert shown in captured.err and "--allow-change" in captured.err and captured.err.count("\n") == 1
        assert "compiled" not in captured.out
    assert train(config, "identity", f"{peak}=0.02", "seed=1", "--allow-change", "seed") == 78
    assert json.loads((workdir / "identity.json").read_text())["config"]["stages"][0]["schedule"]["peak"] == 0.01

    changed = (f"{peak}=0.02", "--allow-change", "stages.0.schedule.peak")
    assert train(config, "identity", *changed, steps=FIRST + 1) == 0
    assert "changed by --allow-change: stages.0.schedule.peak: 0.01 -> 0.02" in capsys.readouterr().out
    new, old = (rows(config, name)[-1]["optim/learning_rate"] for name in ("identity", "first"))
    assert new > 1.5 * old
    assert train(config, "identity", f"{peak}=0.02", steps=FIRST + 1) == 0, "the workdir is the new one's now"


ADAMW = ('{"kind": "adamw"}', '{"kind": "adamw", "first_moment": "bfloat16", "second_moment": "factored"}')
ADAFACTOR = ('{"kind": "adafactor"}', '{"kind": "adafactor", "momentum": 0.9}')


@pytest.mark.slow
@pytest.mark.parametrize("optimizers", [ADAMW, pytest.param(ADAFACTOR, marks=pytest.mark.long)], ids=["adamw", "ada"])
def test_stages_with_other_moments(config: Path, optimizers: tuple[str, str], capsys: pytest.CaptureFixture) -> None:
    """A run that is taken up in its first stage, and at its boundary, finds each stage's own state.

    Also where the newest checkpoint, of another stage, is damaged.
    """
    tree = json.loads(config.read_text())
    (stage,) = tree["stages"]
    first, second = (
        stage | {"name": name, "steps": 4, "optimizer": json.loads(optimizer)}
        for name, optimizer in zip(("first", "second"), optimizers, strict=True)
    )
    tree["stages"] = [first, second | {"reset_optimizer": True}]
    tree["execution"] |= {"save_every": 2, "keep": 9, "eval_every": None}
    tree["model"] |= {"num_layers": 1}
    name = f"moments-{first['optimizer']['kind']}"
    (config.parent / f"{name}.json").write_text(json.dumps(tree))
    workdir = config.parent / name
    call = [str(config.parent / f"{name}.json"), "--workdir", str(workdir)]
    assert main(call) == 0
    metrics, end = (workdir / "metrics.jsonl").read_bytes(), status(config, name)["state_fingerprint"]
    for last, damaged in ((4, None), (2, None), (4, 6), (2, 4)):
        for path in (workdir / "checkpoints").iterdir():
            if not path.name.isdigit() or int(path.name) > (damaged or last):
                shutil.rmtree(path)
        if damaged:
            (workdir / "checkpoints" / str(damaged) / "state" / "manifest.ocdbt").unlink()
        capsys.readouterr()
        assert main(call) == 0
        assert f"resumed at step {last}" in capsys.readouterr().out
        assert (workdir / "metrics.jsonl").read_bytes() == metrics
        assert status(config, name)["state_fingerprint"] == end
