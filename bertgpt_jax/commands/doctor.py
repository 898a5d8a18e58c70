"""Checks a machine before a run does: versions that fit together, devices, storage, and what is not installed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Literal

from bertgpt_jax.commands.common import (
    add_platform,
    check_platform,
    command_parser,
    run_command,
    select_platform,
    visible_accelerators,
)
from bertgpt_jax.errors import ConfigError, UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy", "pydantic")

EXTRAS = {
    "cuda": ("jax_cuda13_plugin", "computing on an NVIDIA GPU"),
    "tpu": ("libtpu", "computing on a TPU"),
    "libtpu": ("libtpu", "compiling for TPUs without one"),
    "gcs": ("gcsfs", "workdirs and corpora at gs://"),
    "s3": ("s3fs", "workdirs and corpora at s3://"),
    "tfds": ("tensorflow", "downloading and preparing TensorFlow Datasets"),
    "zh": ("jieba", "words of Chinese text"),
    "stablehlo": ("flatbuffers", "exporting compiled programs"),
    "viz": ("matplotlib", "plots"),
    "tokamax": ("tokamax", "execution.compute.attention=tokamax, on Python 3.12 and later"),
    "wandb": ("wandb", "logging to Weights & Biases"),
    "test": ("pytest_timeout", "the tests"),
    "parity": ("torch", "comparing with other implementations"),
}
"""Extra of setup.cfg to the module that shows it is installed, and what it is for."""

LITTLE_SPACE = 4 * 2**30

TAR_FIXED = {(3, 11): 13, (3, 12): 11, (3, 13): 4}
"""First patch release of each Python whose tarfile filters cannot be bypassed (CVE-2025-4517, -4138, -4330)."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report; a `problem` makes the exit code 78, a `note` does not."""

    name: str
    value: str
    level: Literal["ok", "note", "problem"] = "ok"
    advice: str = ""


def main(argv: list[str] | None = None) -> int:
    """Prints the report; 0 if a run can start here, 78 if not."""
    parser = command_parser("doctor", __doc__ or "", "exit code: 0 ready, 78 something must be mended first")
    parser.add_argument("--workdir", help="also write, read back and delete a file there, and show the free space")
    add_platform(parser)
    return run_command(_run, parser, argv)


def _run(args: argparse.Namespace) -> int:
    findings = [*versions(), *devices(args.platform), *storage(args.workdir), *extras()]
    print(table(findings))
    problems = sum(f.level == "problem" for f in findings)
    if problems:
        print(f"{problems} problem{'s' * (problems > 1)} to mend before a run can start here")
        return ConfigError.exit_code
    print("ready")
    return 0


def table(findings: Sequence[Finding]) -> str:
    """The findings in aligned columns, advice below its line."""
    names = max(len(f.name) for f in findings)
    lines = []
    for finding in findings:
        mark = {"ok": "  ", "note": "- ", "problem": "! "}[finding.level]
        lines.append(f"{mark}{finding.name:{names}}  {finding.value}".rstrip())
        if finding.advice:
            lines.append(f"  {'':{names}}  -> {finding.advice}")
    return "\n".join(lines)


# ---------------------------------------------------------------- versions


def versions() -> Iterator[Finding]:
    """Python and the packages a run stands on."""
    yield python_finding(sys.version_info[:3])
    found = {name: _version(name) for name in PACKAGES}
    for name, version in found.items():
        if version is None:
            yield Finding(name, "not installed", "problem", "pip install -e . (in a checkout)")
        else:
            yield Finding(name, version)
    if found["jax"] and found["jaxlib"] and found["flax"]:
        for problem, fix in mismatches(sys.version_info[:2], found["jax"], found["jaxlib"], found["flax"]):
            yield Finding("versions", problem, "problem", fix)


def python_finding(version: tuple[int, ...]) -> Finding:
    """Whether this Python is supported, and whether its tarfile is safe with archives from strangers."""
    text, lane = ".".join(map(str, version)), (version[0], version[1])
    if lane not in TAR_FIXED:
        return Finding("python", text, "problem", "use Python 3.11, 3.12 or 3.13")
    fixed = f"{lane[0]}.{lane[1]}.{TAR_FIXED[lane]}"
    if version[2] < TAR_FIXED[lane]:
        return Finding(
            "python", text, "note", f"unpack no untrusted tar archives with it; {fixed} closes CVE-2025-4517"
        )
    return Finding("python", text)


def mismatches(python: tuple[int, ...], jax: str, jaxlib: str, flax: str) -> Iterator[tuple[str, str]]:
    """What does not fit together in these versions, each with the command that mends it."""
    jax_at, jaxlib_at, flax_at = _numbers(jax), _numbers(jaxlib), _numbers(flax)
    if jax_at < (0, 10):
        yield f"jax {jax} is older than 0.10", "pip install -U jax flax"
    if jax_at[:3] == (0, 11, 0):
        yield "jax 0.11.0 is known to be broken", "pip install -U 'jax!=0.11.0'"
    if python < (3, 12) and jax_at >= (0, 11):
        yield f"jax {jax} needs Python 3.12", "pip install 'jax<0.11' 'flax<0.12.9', or use Python 3.12"
    if jaxlib_at[:2] != jax_at[:2] or jaxlib_at > jax_at:
        yield f"jax {jax} does not go with jaxlib {jaxlib}", f"pip install 'jaxlib=={jax}'"
    if jax_at >= (0, 11, 1) and flax_at < (0, 12, 9):
        yield f"jax {jax} breaks flax {flax}", "pip install 'flax>=0.12.9'"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    matched = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in matched.group().split(".")) if matched else ()


# ---------------------------------------------------------------- devices


def devices(platform: str) -> Iterator[Finding]:
    """The hardware there is, and what jax makes of it."""
    yield Finding("cpu", _cpu())
    for accelerator in visible_accelerators():
        yield Finding("accelerator", accelerator.name)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # looking must not take a GPU's memory
    select_platform(platform)
    try:
        import jax

        backend = check_platform(platform)
    except UserError as error:
        yield Finding("backend", "unusable", "problem", str(error))
        return
    except Exception as error:  # a broken installation raises anything, and saying so is what this command is for
        yield Finding("backend", "unusable", "problem", f"{type(error).__name__}: {error}".partition("\n")[0])
        return
    found = jax.devices()
    yield Finding("backend", f"{backend}, {len(found)} x {found[0].device_kind}")
    if jax.process_count() > 1:
        yield Finding("processes", str(jax.process_count()))


def _cpu() -> str:
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {psutil.virtual_memory().total / 2**30:.1f} GiB memory"


# ---------------------------------------------------------------- storage and extras


def storage(workdir: str | None) -> Iterator[Finding]:
    """Whether `workdir` takes a write and gives it back, and how much room it has; a missing one is made."""
    if workdir is None:
        return
    from bertgpt_jax.training import storage as store

    try:
        path = store.workdir_path(workdir)
        probe = store.probe(path)
    except UserError as error:
        yield Finding("workdir", workdir, "problem", str(error))
        return
    renames = "renames" if probe.renames else "no renames (none are needed)"
    yield Finding("workdir", f"{path}: writes, reads, {renames}")
    if probe.free_bytes is not None:
        space = f"{probe.free_bytes / 2**30:.1f} GiB free on {probe.filesystem or 'an unknown filesystem'}"
        if probe.free_bytes < LITTLE_SPACE:
            yield Finding("space", space, "note", "a checkpoint of BERT base alone takes 1.3 GB")
        elif probe.filesystem in ("tmpfs", "ramfs"):
            yield Finding("space", space, "note", "what is written there is gone when the machine restarts")
        else:
            yield Finding("space", space)


def extras() -> Iterator[Finding]:
    """Extras that are missing; those of an accelerator only where one is seen."""
    kinds = {a.extra for a in visible_accelerators()}
    for extra, (module, purpose) in EXTRAS.items():
        if extra in ("cuda", "tpu", "libtpu") and extra not in kinds:
            continue
        if importlib.util.find_spec(module) is None:
            yield Finding(f"[{extra}]", f"not installed: {purpose}", "note", f"pip install 'bertgpt_jax[{extra}]'")
