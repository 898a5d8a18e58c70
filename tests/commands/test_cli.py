"""`bertgpt VERB`: the table of verbs, its errors, and that asking for help is quick because it loads little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bertgpt_jax
from bertgpt_jax.commands import cli


def test_every_verb_has_a_module_and_a_tool(repository: Path) -> None:
    for verb in cli.VERBS:
        assert (repository / "bertgpt_jax" / "commands" / f"{verb}.py").is_file(), verb
        assert (repository / "tools" / f"{verb}.py").is_file(), verb
    assert {p.stem for p in (repository / "tools").glob("*.py")} == set(cli.VERBS)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help_lists_the_verbs(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {verb} " in printed for verb in cli.VERBS)


def test_no_verb_is_a_usage_error_with_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 64
    assert "usage: bertgpt VERB" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"bertgpt_jax {bertgpt_jax.__version__}\n"


@pytest.mark.parametrize(
    ("verb", "advice"), [("trian", "did you mean 'train'"), ("zzz", "known: train, evaluate"), ("--train", "'train'")]
)
def test_an_unknown_verb_is_named_with_the_nearest(verb: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb]) == 64
    message = capsys.readouterr().err
    assert f"'{verb}'" in message and advice in message and message.count("\n") == 1


def test_a_verb_gets_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from bertgpt_jax.commands import doctor

    seen = []
    monkeypatch.setattr(doctor, "main", lambda argv: seen.append(argv) or 7)
    assert cli.main(["doctor", "--workdir", "d"]) == 7
    assert seen == [["--workdir", "d"]]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_tools_help_names_it_and_loads_no_jax(verb: str, repository: Path) -> None:
    program = (
        f"import runpy, sys; sys.argv = ['tools/{verb}.py', '--help']\n"
        f"try: runpy.run_path('tools/{verb}.py', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith(f"usage: tools/{verb}.py") and done.stdout.endswith("\n0 False\n")
    assert "--debug" in done.stdout
