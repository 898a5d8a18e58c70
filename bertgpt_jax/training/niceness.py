"""Threads that read and write files leave the CPU to training."""

from __future__ import annotations

import os
import sys
import threading

import numpy as np
import tensorstore

NICENESS = 10
"""A thread of this niceness gets a tenth of a core that another thread wants too, and all of an idle one."""


def let_files_wait() -> None:
    """Lowers the priority of TensorStore's threads, which write checkpoints and read corpora; Linux only.

    To be called before anything else uses TensorStore: its pool's threads inherit the priority of the thread that
    makes the pool.
    """
    if sys.platform != "linux":
        return
    thread = threading.Thread(target=_make_the_pool, name="niceness")
    thread.start()
    thread.join()


def _make_the_pool() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    array = tensorstore.open(
        {"driver": "zarr", "kvstore": "memory://"}, create=True, dtype=np.uint8, shape=[64], chunk_layout=_IN_PARTS
    ).result()
    array.write(np.zeros(64, np.uint8)).result()


_IN_PARTS = tensorstore.ChunkLayout(chunk_shape=[8])
