"""Processes that a benchmark starts and reads: killed in the end, and when they take too long."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence

TRAIN = "import sys; from bertgpt_jax.commands.train import main; sys.exit(main(sys.argv[1:]))"
"""What `python -c` runs for `tools/train.py`, wherever the package lies."""


@contextlib.contextmanager
def started(command: Sequence[str], timeout: float, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A process whose output is read; it knows of no compilation cache of jax but what its command names.

    Args:
        variables: more of its environment.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    environment |= variables
    pipe = subprocess.PIPE
    process = subprocess.Popen(list(command), env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    alarm = threading.Timer(timeout, process.kill)
    alarm.start()
    try:
        yield process
    finally:
        alarm.cancel()
        process.kill()
        process.communicate()
