"""The workdir's name, whole-object writes, torn objects, and storage that refuses rename; nobody else writes."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
from etils import epath

from bertgpt_jax.errors import ConfigError, StorageError, UserError
from bertgpt_jax.training import storage


@pytest.mark.parametrize(
    ("text", "code", "shown"),
    [
        ("", 78, "empty"),
        ("  ", 78, "empty"),
        ("runs/a ", 78, "'runs/a '"),
        (" runs/a", 78, "' runs/a'"),
        ("runs\n", 78, r"'runs\n'"),
        ("runs/\x07a", 78, r"'runs/\x07a'"),
        ("file:///data/run", 78, "'/data/run'"),
        ("file:/data/run", 78, "file:/data/run"),
        ("gs:/bucket/run", 78, "gs://BUCKET"),
        ("hdfs://name/run", 78, "hdfs://"),
        ("gs://", 78, "names no bucket"),
        ("gs:///run", 78, "names no bucket"),
        ("~nobody-of-this-name/run", 78, "~nobody-of-this-name"),
    ],
)
def test_bad_workdir_is_one_line(text: str, code: int, shown: str) -> None:
    with pytest.raises(UserError) as caught:
        storage.workdir_path(text)
    assert caught.value.exit_code == code
    assert shown in str(caught.value)
    assert "\n" not in str(caught.value)


def test_workdir_that_is_or_lies_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("notes.txt", "notes.txt/run", "loop"):
        with pytest.raises(ConfigError, match="notes.txt' is a file|loop' cannot be followed"):
            storage.workdir_path(str(tmp_path / name))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_good_workdirs_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert str(storage.workdir_path("runs/../run")) == str(tmp_path / "run")
    assert str(storage.workdir_path("~/run")) == str(tmp_path / "home" / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("scheme", "remedy"), [("gs", r"bertgpt_jax\[gcs\]"), ("s3", "s3fs")])
def test_bucket_without_its_client_says_what_to_install(
    scheme: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=remedy):
        storage.workdir_path(f"{scheme}://bucket/run")
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: object())
    path = storage.workdir_path(f"{scheme}://bucket/run")
    assert str(path) == f"{scheme}://bucket/run"
    assert not storage.is_local(path)


def test_objects_round_trip_and_torn_json_reads_as_none(tmp_path: Path) -> None:
    root = epath.Path(tmp_path)
    storage.write_json(root / "deep" / "down" / "a.json", {"a": [1, 2.5, None]})
    assert storage.read_json(root / "deep" / "down" / "a.json") == {"a": [1, 2.5, None]}
    text = storage.read_text(root / "deep" / "down" / "a.json")
    assert text is not None
    for length in range(len(text) - 2):
        storage.write_text(root / "torn.json", text[:length])
        assert storage.read_json(root / "torn.json") is None
    assert storage.read_json(root / "missing.json") is None
    assert storage.read_bytes(root / "deep") is None
    assert storage.list_names(root / "nowhere") == []
    storage.delete(root / "missing.json")
    storage.delete_tree(root / "nowhere")


def test_unwritable_place_names_the_path_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write '.*file/x'.*ot a directory"):
        storage.write_text(epath.Path(tmp_path / "file" / "x"), "text")
    if Path("/dev/full").exists():
        with pytest.raises(StorageError, match="No space left on device; free some space"):
            storage.write_text(epath.Path("/dev/full"), "text")


@pytest.mark.parametrize("renames", [True, False])
def test_probe_and_move_tree_work_without_rename(
    renames: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not renames:
        monkeypatch.setattr(os, "rename", _refuse)
        monkeypatch.setattr(os, "replace", _refuse)
    root = epath.Path(tmp_path) / "run"
    found = storage.probe(root)
    assert found.renames is renames
    assert found.free_bytes is not None and found.free_bytes > 0
    assert storage.list_names(root) == []
    storage.write_bytes(root / "a" / "b" / "c", b"\x00\xff")
    storage.write_bytes(root / "a" / "d", b"d")
    storage.move_tree(root / "a", root / "z")
    assert storage.list_names(root) == ["z"]
    assert storage.read_bytes(root / "z" / "b" / "c") == b"\x00\xff"
    assert storage.list_names(root / "z") == ["b", "d"]


def _refuse(*_: object) -> None:
    raise OSError(95, "Operation not supported")


def test_filesystem_type(tmp_path: Path) -> None:
    if not Path("/proc/mounts").exists():
        pytest.skip("no /proc/mounts")
    assert storage.filesystem(epath.Path("/proc/self")) == "proc"
    assert storage.filesystem(epath.Path(tmp_path))


_WRITERS = {"write_text", "write_bytes", "mkdir", "makedirs", "unlink", "rmtree", "rmdir", "rename", "touch", "remove"}


def _writes(path: Path) -> list[str]:
    """Calls in a module that write, move or delete files other than through `storage` or `checkpoint_files`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        mode = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        opens = name == "open" and any(isinstance(m, str) and set(m) & set("wax+") and len(m) < 4 for m in mode)
        if opens or (name in _WRITERS and owner not in ("storage", "files")):
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node.func)}")
    return found


def _beside_the_workdir(line: str) -> bool:
    """The cache of compiled programs is a local directory beside the workdir, private to the user."""
    return line.startswith("kept.py:") or line.startswith("workdir.py:") and line.endswith(": path.mkdir")


def test_only_storage_writes_into_the_workdir(repository: Path) -> None:
    package = repository / "bertgpt_jax"
    modules = [p for part in ("training", "evaluation", "objectives", "parallel") for p in package.glob(f"{part}/*.py")]
    assert _writes(package / "training" / "storage.py"), "the check must see what storage does"
    found = [line for p in modules if p.name != "storage.py" for line in _writes(p)]
    assert [line for line in found if not _beside_the_workdir(line)] == []
