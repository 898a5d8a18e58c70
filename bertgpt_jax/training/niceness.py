"""Threads that read and write files leave the CPU to training."""

from __future__ import annotations

import os
import sys
import threading

import numpy as np
import tensorstore

NICENESS = 19
"""A thread of this niceness gets a sixtieth of a core that another thread wants too, and all of an idle one."""

_IN_PARTS = tensorstore.ChunkLayout(chunk_shape=[8])


def give_way() -> None:
    """Lowers the priority of the calling thread and of the threads that it will start; Linux only."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def let_files_wait() -> None:
    """Lowers the priority of TensorStore's threads, which write checkpoints and read corpora.

    To be called before anything else uses TensorStore: its pool's threads inherit the priority of the thread that
    makes the pool.
    """
    thread = threading.Thread(target=_make_the_pool, name="niceness")
    thread.start()
    thread.join()


def _make_the_pool() -> None:
    give_way()
    array = tensorstore.open(
        {"driver": "zarr", "kvstore": "memory://"}, create=True, dtype=np.uint8, shape=[64], chunk_layout=_IN_PARTS
    ).result()
    array.write(np.zeros(64, np.uint8)).result()
