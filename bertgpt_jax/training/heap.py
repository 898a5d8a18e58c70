"""Memory that is freed on the CPU stays with the process."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""Parameters of mallopt(3), glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Makes malloc use large blocks again instead of giving them back to the system; with glibc only.

    XLA for CPUs allocates the temporaries of a program in every call of it. Given back, each of their pages has to be
    found and zeroed again in the next step: 75,000 pages, and 265 of 1,800 ms of CPU time, in the steps of a GPT of 4
    layers of 256. The process then holds what it needed at its worst moment, and gaps: 1.3 in place of 0.8 GB there.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # a mapping of its own for a large block ends with it
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_ARENA_MAX, 1)  # other threads' arenas hold no block over 64 MB, and map those all the same
