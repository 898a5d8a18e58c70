"""Files that are being written leave the operating system's page cache as they go."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from etils import epath

from bertgpt_jax.training import storage
from bertgpt_jax.training.niceness import give_way

DISKS = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "xfs"})
"""File systems of one machine; where others look into a directory, or the cache is another, it is left alone."""

PAUSE = 0.01
"""Seconds between two looks at the files: a disk of 2 GB/s writes 20 MB."""


class Uncached:
    """Drops what is cached of a directory's files, again and again, until its end is seen or told; Linux only.

    A checkpoint is not read again soon. Cached, it takes the corpus's place in memory, and pages that the kernel has to
    find first: on a virtual machine whose host takes free memory back, that took 6.6 of the 7.3 CPU seconds of a save
    of 1.5 GB. Dropped as they are written, the same few pages serve a whole file.

    Args:
        directory: of files being written; need not exist yet.
        end: a file whose appearance is the end.
    """

    def __init__(self, directory: epath.Path, end: epath.Path):
        self._stopped = threading.Event()
        self._directory, self._end = str(directory), Path(end)
        self._thread: threading.Thread | None = None
        if hasattr(os, "posix_fadvise") and storage.filesystem(directory) in DISKS:
            self._thread = threading.Thread(target=self._drop, name="page-cache", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Returns when nothing is dropped any more."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _drop(self) -> None:
        give_way()
        while not self._stopped.wait(PAUSE):
            ended = self._end.exists()
            for root, _, names in os.walk(self._directory):
                for name in names:
                    with contextlib.suppress(OSError):  # removed or renamed meanwhile
                        _drop_file(os.path.join(root, name))
            if ended:
                return


def _drop_file(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # what is not on the disk yet is sent there
    finally:
        os.close(descriptor)
