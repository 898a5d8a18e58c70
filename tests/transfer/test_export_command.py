"""The export command on workdirs: which checkpoint, one that is being written, damaged or removed (rows 61-69)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bertgpt_jax.commands import export
from bertgpt_jax.corpus.characters import Characters
from bertgpt_jax.training import checkpoint_files
from bertgpt_jax.transfer import workdir as reading
from bertgpt_jax.transfer.import_model import import_model


@pytest.fixture(scope="module")
def saved(make_source, configs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "run"
    import_model(make_source(configs["gpt2"], tokenizer=Characters("abc")), str(path))
    return path


@pytest.fixture
def run(saved, tmp_path, in_process, capsys):
    """(workdir, call): call(*argv) exports it and gives (exit code, what was said, names left beside the workdir)."""
    workdir = Path(shutil.copytree(saved, tmp_path / "run"))

    def call(*argv: str) -> tuple[int, str, list[str]]:
        out = () if "--out" in argv else ("--out", str(tmp_path / "out"))
        code = export.main([str(workdir), "--format", "hf", "--proof", "numpy", *out, *argv])
        caught = capsys.readouterr()
        assert caught.err.count("\n") == (1 if code else 0), caught.err
        return code, caught.out + caught.err, sorted(p.name for p in tmp_path.iterdir() if p != workdir)

    return workdir, call


def test_a_save_under_way_is_not_taken(run) -> None:
    """A run that writes: its newest step has no commit marker yet."""
    workdir, call = run
    (workdir / "checkpoints" / "9" / "state").mkdir(parents=True)
    (workdir / "checkpoints" / "9" / "meta.json").write_text('{"format_version": 1, "step": 9')
    (workdir / "run.lock").write_text("{}")
    code, said, left = call("--which", "latest")
    assert code == 0 and "step 0 as hf" in said and left == ["out"]
    assert json.loads((workdir.parent / "out" / "export_proof.json").read_text())["step"] == 0


def test_a_checkpoint_that_goes_away_meanwhile(run, monkeypatch) -> None:
    workdir, call = run
    read = reading.restore

    def removing(path, abstract, step, partial):
        if any("layers" in name for name in abstract):
            shutil.rmtree(workdir / "checkpoints" / "0")
        return read(path, abstract, step, partial=partial)

    monkeypatch.setattr(reading, "restore", removing)
    code, said, left = call()
    assert code == 78 and "removed this checkpoint while it was read" in said and left == []


def flip(workdir: Path) -> None:
    """One bit in the middle of the largest file of arrays."""
    files = [path for path in (workdir / "checkpoints" / "0" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)


def newer(workdir: Path) -> None:
    meta = json.loads((workdir / "checkpoints" / "0" / "meta.json").read_text())
    meta["format_version"] = 99
    (workdir / "checkpoints" / "0" / "meta.json").write_text(json.dumps(meta))


def other_tokenizer(workdir: Path) -> None:
    shutil.rmtree(workdir / "tokenizer")
    Characters("abd").save(workdir / "tokenizer")


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (flip, 65, ["step 0", "damaged"]),
        (newer, 65, ["format_version 99"]),
        (other_tokenizer, 65, ["another tokenizer"]),
        (lambda w: shutil.rmtree(w / "tokenizer"), 78, ["no tokenizer directory"]),
        (lambda w: shutil.rmtree(w / "checkpoints"), 78, ["holds no checkpoint"]),
        (lambda w: (w / "checkpoints/0/state" / checkpoint_files.COMMIT_MARKER).unlink(), 78, ["holds no checkpoint"]),
        (lambda w: (w / "config.json").write_text("{}"), 78, ["neither the workdir of a run nor"]),
    ],
)
def test_a_workdir_that_is_not_right(run, damage, code: int, words: list[str]) -> None:
    workdir, call = run
    damage(workdir)
    found, said, left = call()
    assert found == code and all(word in said for word in words), said
    assert left == []


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--which", "5"], 78, ["no checkpoint of step 5", "available: 0"]),
        (["--which", "newest"], 64, ["'newest'", "best, latest nor a step"]),
        (["--shard-size", "lots"], 78, ["'lots'", "5GB"]),
        (["--shard-size", "0GB"], 78, ["'0GB'"]),
        (["--proof-layers", "0"], 64, ["--proof-layers 0"]),
        (["--dtype", "float16"], 64, ["float16"]),
        (["--format", "onnx"], 64, ["onnx"]),
    ],
)
def test_a_command_line_that_is_not_right(run, argv: list[str], code: int, words: list[str]) -> None:
    found, said, left = run[1](*argv)
    assert found == code and all(word in said for word in words), said
    assert left == []


def test_targets_inside_the_checkpoints_and_there(run) -> None:
    workdir, call = run
    code, said, _ = call("--out", str(workdir / "checkpoints" / "hf"))
    assert code == 78 and "inside the checkpoints" in said and not (workdir / "checkpoints" / "hf").exists()
    code, said, _ = call("--out", str(workdir))
    assert code == 78 and "exists" in said
    (workdir.parent / "link").symlink_to(workdir / "checkpoints")
    code, said, _ = call("--out", str(workdir.parent / "link" / "hf"))
    assert code == 78 and "inside the checkpoints" in said and not (workdir / "checkpoints" / "hf").exists()


def test_a_name_of_the_hub(capsys, tmp_path) -> None:
    assert export.main(["gpt2", "--format", "hf", "--out", str(tmp_path / "out")]) == 78
    assert "hf download gpt2 --local-dir gpt2" in capsys.readouterr().err
