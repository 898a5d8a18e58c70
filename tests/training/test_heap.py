"""Large blocks of memory are used again."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CODE = """
import resource, sys, threading
from bertgpt_jax.training.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()

def count():
    bytearray(128 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(128 << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=count)
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how malloc gives memory back is told to glibc")
def test_freed_blocks_cost_no_new_pages() -> None:
    """In processes of their own, of which one does without: what malloc is told holds for its life."""
    faults = {}
    for how in ("kept", "given back"):
        command = [sys.executable, "-c", _CODE, how]
        faults[how] = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert 100 * faults["kept"] < faults["given back"], faults
