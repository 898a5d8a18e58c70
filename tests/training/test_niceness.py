"""Threads that write checkpoints: their priority is below that of training."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CODE = """
import os, threading
import numpy as np, tensorstore
from bertgpt_jax.training.niceness import NICENESS, let_files_wait
let_files_wait()
where = {"driver": "zarr", "kvstore": "memory://"}
store = tensorstore.open(where, create=True, dtype=np.uint8, shape=[1 << 22]).result()
store.write(np.ones(1 << 22, np.uint8)).result()
tasks = {task: open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")}
found = [os.getpriority(os.PRIO_PROCESS, int(task)) for task, name in tasks.items() if name.startswith("ts_pool")]
assert found and set(found) == {NICENESS}, found
assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < NICENESS
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_threads_of_tensorstore_give_way() -> None:
    """In a process of its own: whoever uses TensorStore first decides."""
    subprocess.run([sys.executable, "-c", _CODE], check=True, timeout=120)
