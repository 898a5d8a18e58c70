"""The project's own promises: what setup.cfg, the README and the guide say is so."""

from __future__ import annotations

import ast
import configparser
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import bertgpt_jax
from bertgpt_jax.config import shipped_configs

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "bertgpt_jax").rglob("*.py"))
ALL_PYTHON = [*SOURCES, *sorted(p for name in ("configs", "tools", "tests") for p in (ROOT / name).rglob("*.py"))]

DISTRIBUTIONS = {
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "tensorflow_datasets": "tensorflow-datasets",
    "tensorflow": "tensorflow-cpu",
    "pydantic_core": "pydantic",
    "apache_beam": "apache-beam",
    "jaxlib": "jax",
    "pytest_timeout": "pytest-timeout",
    "yaml": "pyyaml",
}
"""Module to the distribution it comes in, where the two differ."""

INDIRECT = {"importlib_resources"}
"""Required because another requirement imports it without asking for it."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(comment_prefixes=("#",))
    parsed.read(ROOT / "setup.cfg", "utf-8")
    return parsed


def names(requirements: str) -> set[str]:
    """Distribution names in a block of requirements."""
    lines = [line.strip() for line in requirements.splitlines() if line.strip() and not line.strip().startswith("#")]
    return {re.match(r"[A-Za-z0-9._-]+", line).group().lower() for line in lines}  # type: ignore[union-attr]


def imported(paths: list[Path]) -> set[str]:
    """Top-level names of the third-party modules that `paths` import anywhere."""
    found: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"bertgpt_jax", "tests"}


def distribution(module: str) -> str:
    return DISTRIBUTIONS.get(module, module).lower()


# ---------------------------------------------------------------- packaging


def test_every_folder_of_modules_is_packaged(setup: configparser.ConfigParser) -> None:
    listed = set(setup["options"]["packages"].split())
    folders = {p.parent.relative_to(ROOT) for p in SOURCES}
    folders |= {Path("bertgpt_jax") / p.parent.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.py")}
    assert listed == {".".join(folder.parts) for folder in folders}


def test_every_packaged_folder_is_a_package() -> None:
    assert [relative(p.parent) for p in SOURCES if not (p.parent / "__init__.py").is_file()] == []


def test_what_the_package_imports_is_required(setup: configparser.ConfigParser) -> None:
    required = names(setup["options"]["install_requires"])
    optional = set().union(*(names(block) for block in setup["options.extras_require"].values()))
    optional |= names((ROOT / "requirements-beam.txt").read_text("utf-8"))
    assert {distribution(m) for m in imported(SOURCES)} - required - optional == set()


def test_what_is_required_is_imported(setup: configparser.ConfigParser) -> None:
    used = {distribution(m) for m in imported(SOURCES)}
    assert names(setup["options"]["install_requires"]) - used == INDIRECT


def test_what_the_tests_import_is_in_their_extras(setup: configparser.ConfigParser) -> None:
    extras = setup["options.extras_require"]
    available = names(setup["options"]["install_requires"]) | names(extras["test"]) | names(extras["parity"])
    tests = sorted((ROOT / "tests").rglob("*.py"))
    local = {p.stem for p in tests} | {p.name for p in (ROOT / "tests").iterdir() if p.is_dir()}
    assert {distribution(m) for m in imported(tests) - local} - available == set()


@pytest.mark.parametrize(
    "extra", sorted({m for p in SOURCES for m in re.findall(r"bertgpt_jax\[(\w+)\]", p.read_text())})
)
def test_an_extra_that_a_message_names_exists(extra: str, setup: configparser.ConfigParser) -> None:
    assert extra in setup["options.extras_require"]


def test_the_console_command_exists(setup: configparser.ConfigParser) -> None:
    target = setup["options.entry_points"]["console_scripts"].partition("=")[2].strip()
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_shipped_configs_are_those_in_the_tree() -> None:
    files = {p.relative_to(ROOT / "configs").with_suffix("").as_posix() for p in (ROOT / "configs").rglob("*.py")}
    assert set(shipped_configs()) == files and "quickstart" in files


def test_the_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", bertgpt_jax.__version__)


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


# ---------------------------------------------------------------- habits


def test_pytest_reads_these_settings(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.inipath == ROOT / "setup.cfg"


@pytest.mark.parametrize("path", ALL_PYTHON, ids=relative)
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text("utf-8")
    assert source.count("\n") <= (600 if path.is_relative_to(ROOT / "tests") else 400)
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f"{f.name}: {f.end_lineno - f.lineno + 1}" for f in functions if f.end_lineno - f.lineno >= 80] == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_modules_say_what_they_are_and_leave_nothing_for_later(path: Path) -> None:
    source = path.read_text("utf-8")
    assert ast.get_docstring(ast.parse(source)), "no docstring"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", source)


def test_test_files_have_names_of_their_own() -> None:
    stems = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(stems) == sorted(set(stems))


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=relative)
def test_a_tool_is_thin_and_shadows_no_module(path: Path) -> None:
    assert path.stem not in sys.stdlib_module_names
    assert len(path.read_text("utf-8").splitlines()) <= 10


# ---------------------------------------------------------------- README


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text("utf-8")


def command(readme: str, name: str) -> str:
    """The line in the code block after `<!-- name -->`."""
    blocks = re.findall(rf"^<!-- {name} -->\n```\n(.*?)\n```$", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1 and "\n" not in blocks[0], f"{name} must be one line after its mark"
    return blocks[0]


def test_ci_runs_the_readmes_test_command(readme: str) -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    function = next(line for line in script.splitlines() if line.startswith("readme_command()"))
    done = subprocess.run(
        ["bash", "-c", f"{function}\nreadme_command test-command"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == command(readme, "test-command")
    assert "command=$(readme_command test-command)" in script and 'bash -euo pipefail -c "$command"' in script


def test_the_readmes_commands_name_files_and_extras_that_exist(readme: str, setup: configparser.ConfigParser) -> None:
    words = shlex.split(command(readme, "train-command"))
    assert all((ROOT / word).is_file() for word in words if word.endswith(".py"))
    assert all(extra in setup["options.extras_require"] for extra in re.findall(r"'\.\[(\w+)\]'", readme))
    for name in re.findall(r"python tools/(\w+)\.py", readme):
        assert (ROOT / "tools" / f"{name}.py").is_file(), name
    for name in re.findall(r"configs/[\w/]+\.py", readme):
        assert (ROOT / name).is_file(), name


def test_the_readmes_tree_is_the_tree(readme: str) -> None:
    tree = readme.partition("## Where things are")[2].partition("```\n")[2].partition("\n```")[0]
    listed = set(re.findall(r"^  ([\w.]+)/? ", tree, re.MULTILINE))
    inside = {p.name for p in (ROOT / "bertgpt_jax").iterdir() if p.is_file() or (p / "__init__.py").is_file()}
    assert listed == inside - {"__init__.py"}
