"""What is in a workdir's checkpoints or a Hugging Face directory, read without building the model."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from bertgpt_jax.config import differences
from bertgpt_jax.errors import DataError
from bertgpt_jax.training import checkpoint_files, storage
from bertgpt_jax.training.checkpoint_files import COMMIT_MARKER, Damaged
from bertgpt_jax.training.status import read_status
from bertgpt_jax.transfer.load import is_workdir, open_source
from bertgpt_jax.transfer.tensors import TensorFiles, read_json
from bertgpt_jax.transfer.workdir import BEST_METRIC, read_arrays

Leaves = dict[str, tuple[str, tuple[int, ...]]]


def describe(path: str, *, verify: bool = False) -> list[str]:
    """The lines of the report.

    Args:
        verify: read every array of a workdir's checkpoints too, and compare its fingerprint.

    Raises:
        ConfigError: there is nothing of the kind at `path`.
    """
    if not is_workdir(path):
        return _describe_directory(Path(path).expanduser())
    workdir = storage.workdir_path(path)
    status = read_status(workdir) or {}
    lines = [f"{workdir}: {status.get('reason', 'no STATUS.json')}, step {status.get('step')}"]
    if status.get("message"):
        lines.append(f"  {status['message']}")
    metas, rows = {}, []
    for step in checkpoint_files.all_steps(workdir):
        try:
            meta = checkpoint_files.check_meta(workdir, step)
            if verify:
                read_arrays(workdir, meta, list(meta["leaves"]))
            metas[step], state = meta, "every bit as saved" if verify else "whole"
        except (Damaged, DataError) as error:
            state = str(error)
        rows.append((step, state))
    best = _best(metas)
    lines.append(f"  {'step':>10}  {'size':>10}  {'age':>8}  {'stage':12} {'metric':>12}  state")
    for step, state in rows:
        size, age = _size_and_age(checkpoint_files.step_directory(workdir, step))
        meta = metas.get(step, {})
        score = (meta.get("metrics") or {}).get(BEST_METRIC)
        shown = "" if score is None else f"{score:.4f}"
        marks = " (best)" if step in best else ""
        stage = meta.get("stage", "")
        lines.append(f"  {step:>10,}  {_bytes(size):>10}  {_age(age):>8}  {stage:12} {shown:>12}  {state}{marks}")
    for name in storage.list_names(checkpoint_files.directory(workdir)):
        if name.startswith(("bad.", "old.")):
            lines.append(f"  set aside: {name}")
    if not metas:
        return [*lines, "  no checkpoint can be used"]
    return [*lines, *_describe_meta(metas[max(metas)])]


def _best(metas: dict[int, dict[str, Any]]) -> set[int]:
    scores = {step: checkpoint_files.read_score(meta, BEST_METRIC) for step, meta in metas.items()}
    return set(checkpoint_files.best_steps(scores).values())


def _describe_meta(meta: dict[str, Any]) -> list[str]:
    mesh = ", ".join(f"{axis}={size}" for axis, size in (meta.get("mesh") or {}).items() if size > 1) or "one device"
    lines = [
        f"step {meta['step']:,}:",
        f"  saved on {mesh} ({meta.get('devices')} devices, {meta.get('processes')} processes), "
        + ", ".join(f"{name} {version}" for name, version in meta.get("versions", {}).items()),
        f"  state fingerprint {meta['state_fingerprint']}",
        f"  tokenizer sha256  {meta.get('tokenizer_sha256')}",
        f"  data fingerprint  {meta.get('data_fingerprint')}",
    ]
    if meta.get("imported_from"):
        lines.append(f"  imported from     {meta['imported_from']}")
    leaves = {path: (dtype, tuple(shape)) for path, (dtype, shape) in meta["leaves"].items()}
    return [*lines, *_tree(leaves)]


def _describe_directory(directory: Path) -> list[str]:
    """A Hugging Face directory: files, tensors, and whether they are those of its manifest."""
    config, files = read_json(directory / "config.json"), TensorFiles(directory)
    sizes = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    return [
        f"{directory}: {config.get('model_type')}, {', '.join(config.get('architectures') or ['no architecture'])}, "
        f"{_bytes(sizes)}",
        *_manifest(directory),
        *_tree(files.shapes),
    ]


def _manifest(directory: Path) -> list[str]:
    if not (directory / "manifest.json").is_file():
        return ["  no manifest: bits cannot be checked"]
    wrong = []
    for name, entry in read_json(directory / "manifest.json").get("files", {}).items():
        path = directory / Path(name).name
        if not path.is_file() or _sha256(path) != entry.get("sha256"):
            wrong.append(name)
    return [f"  changed since the export: {', '.join(wrong)}" if wrong else "  every file is as its manifest says"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tree(leaves: Leaves) -> list[str]:
    total = sum(int(np.prod(shape)) for path, (_, shape) in leaves.items() if not path.startswith("optimizer/"))
    lines = [f"  {len(leaves)} arrays, {total:,} numbers outside the optimizer"]
    return [*lines, *(f"    {path:60} {dtype:10} {list(shape)}" for path, (dtype, shape) in leaves.items())]


def _size_and_age(directory: epath.Path) -> tuple[int | None, float | None]:
    if not storage.is_local(directory):
        return None, None
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    marker = Path(directory) / "state" / COMMIT_MARKER
    age = time.time() - marker.stat().st_mtime if marker.is_file() else None
    return sum(path.stat().st_size for path in files), age


def _bytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f} MiB"


def _age(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


# ---------------------------------------------------------------- differences


def diff(first: str, second: str, which: str = "latest") -> list[str]:
    """What differs between two checkpoints: config, data, and every parameter (largest difference).

    Raises:
        ConfigError, DataError: one of them cannot be read.
    """
    a, b = open_source(first, which), open_source(second, which)
    lines = [f"A {a.label}", f"B {b.label}"]
    trees = [source.meta.get("config") or {"model": source.model_config.model_dump(mode="json")} for source in (a, b)]
    for path, (old, new) in differences(*trees).items():
        lines.append(f"  config {path}: {json.dumps(old)} -> {json.dumps(new)}")
    for name in ("tokenizer_sha256", "data_fingerprint"):
        if a.meta.get(name) != b.meta.get(name):
            lines.append(f"  {name}: {a.meta.get(name)} -> {b.meta.get(name)}")
    same = 0
    for path in [*a.leaves, *(path for path in b.leaves if path not in a.leaves)]:
        if a.leaves.get(path) != b.leaves.get(path):
            lines.append(f"  {path}: {_show(a.leaves.get(path))} -> {_show(b.leaves.get(path))}")
            continue
        x, y = (source.read([path])[path].astype(np.float32) for source in (a, b))
        if np.array_equal(x, y):
            same += 1
            continue
        lines.append(f"  {path}: differs by {np.abs(x - y).max():.3e} at most, {np.mean(x != y):.0%} of the numbers")
    return [*lines, f"  {same} of {len(a.leaves)} parameters are equal bit for bit"]


def _show(leaf: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if leaf is None else f"{leaf[0]}{list(leaf[1])}"
