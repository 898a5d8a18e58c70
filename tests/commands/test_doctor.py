"""The report on a machine: version pairs, storage, extras, and an exit code that means what it says."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest

from bertgpt_jax.commands import common, doctor

PYTHON = (3, 12)


@pytest.mark.parametrize(
    ("python", "jax", "jaxlib", "flax"),
    [((3, 11), "0.10.2", "0.10.2", "0.12.8"), (PYTHON, "0.12.0.1", "0.12.0.1", "0.12.12")],
)
def test_both_lanes_fit_together(python: tuple[int, ...], jax: str, jaxlib: str, flax: str) -> None:
    assert list(doctor.mismatches(python, jax, jaxlib, flax)) == []


@pytest.mark.parametrize(
    ("python", "jax", "jaxlib", "flax", "words"),
    [
        (PYTHON, "0.11.1", "0.11.1", "0.12.8", ["jax 0.11.1", "flax 0.12.8", "flax>=0.12.9"]),
        ((3, 11), "0.11.1", "0.11.1", "0.12.9", ["jax 0.11.1", "Python 3.12"]),
        (PYTHON, "0.11.0", "0.11.0", "0.12.12", ["0.11.0", "!=0.11.0"]),
        (PYTHON, "0.9.2", "0.9.2", "0.12.8", ["jax 0.9.2", "0.10"]),
        (PYTHON, "0.12.0", "0.10.2", "0.12.12", ["jaxlib 0.10.2", "jaxlib==0.12.0"]),
        (PYTHON, "0.12.0", "0.12.1", "0.12.12", ["jaxlib 0.12.1"]),
    ],
)
def test_a_pair_that_breaks_is_named_with_its_fix(python, jax, jaxlib, flax, words) -> None:
    found = list(doctor.mismatches(python, jax, jaxlib, flax))
    assert len(found) == 1 and all(word in " ".join(found[0]) for word in words)


@pytest.mark.parametrize(
    ("version", "level"),
    [
        ((3, 10, 14), "problem"),
        ((3, 11, 12), "note"),
        ((3, 11, 13), "ok"),
        ((3, 12, 10), "note"),
        ((3, 13, 4), "ok"),
        ((3, 14, 0), "problem"),
    ],
)
def test_pythons_version_and_its_tarfile(version: tuple[int, ...], level: str) -> None:
    assert doctor.python_finding(version).level == level


def test_the_extras_are_those_of_the_package(repository: Path) -> None:
    parsed = configparser.ConfigParser()
    parsed.read(repository / "setup.cfg", "utf-8")
    assert set(doctor.EXTRAS) == set(parsed["options.extras_require"])


def test_an_accelerators_extra_is_named_only_beside_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert not {"[cuda]", "[tpu]"} & {f.name for f in doctor.extras()}
    monkeypatch.setattr(doctor, "visible_accelerators", lambda: [common.Accelerator("gpu", "1 x GPU", "cuda")])
    advice = {f.name: f.advice for f in doctor.extras()}
    assert "bertgpt_jax[cuda]" in advice["[cuda]"] and "[tpu]" not in advice


def test_a_report_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--platform", "cpu", "--workdir", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("jaxlib", "cpu, 8 x cpu", str(tmp_path), "GiB free", "\nready\n"))
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("workdir", ["file:///tmp/x", "gs:/x", " x", "FILE"])
def test_a_workdir_that_cannot_be_used_is_78_and_named(workdir: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "FILE").write_text("kept")
    workdir = str(tmp_path / workdir) if workdir == "FILE" else workdir
    assert doctor.main(["--platform", "cpu", "--workdir", workdir]) == 78
    printed = capsys.readouterr().out
    assert workdir in printed and "1 problem to mend" in printed
    assert (tmp_path / "FILE").read_text() == "kept"


def test_little_space_and_space_in_memory_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bertgpt_jax.training import storage

    for probe, word in [
        (storage.Probe(True, 2**20, "ext4"), "checkpoint"),
        (storage.Probe(True, 2**40, "tmpfs"), "gone"),
    ]:
        monkeypatch.setattr(storage, "probe", lambda path, probe=probe: probe)
        noted = [f for f in doctor.storage(str(tmp_path)) if f.level == "note"]
        assert len(noted) == 1 and word in noted[0].advice


def test_problems_decide_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "flax" else "0.12.0")
    assert doctor.main(["--platform", "cpu"]) == 78
    printed = capsys.readouterr().out
    assert "! flax" in printed and "not installed" in printed
