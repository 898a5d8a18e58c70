"""What the processes of a run must bring alike, known before any of them touches a device or the data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import bertgpt_jax
from bertgpt_jax.training import resume
from bertgpt_jax.training.run_config import RunConfig

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""Distributions whose versions decide what is computed or written."""


def shared_facts(config: RunConfig, call: dict[str, Any]) -> dict[str, Any]:
    """All settings but where the text lies and who is who, versions, and the code, as a JSON tree.

    Args:
        call: the other arguments of the run (workdir, step to go on from).
    """
    settings = config.model_dump(mode="json", exclude={"corpus": True, "execution": {"distributed"}})
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions |= {"bertgpt_jax": bertgpt_jax.__version__, "python": ".".join(platform.python_version_tuple()[:2])}
    return settings | {"corpus": resume.identity(config.corpus)} | call | {"versions": versions, "code": code_hashes()}


def code_hashes() -> dict[str, str]:
    """First 12 digits of the sha256 of every module of this package, by its path in it."""
    root = Path(bertgpt_jax.__file__).parent
    files = sorted(path for path in root.rglob("*.py"))
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files}
