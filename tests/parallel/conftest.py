"""Shares `mesh_runs.py`, which is also a program of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

RUNS = Path(__file__).with_name("mesh_runs.py")


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """The module `mesh_runs`."""
    spec = importlib.util.spec_from_file_location("mesh_runs", RUNS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
