"""Batches built ahead of the training step, in threads, by Grain."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import grain

from bertgpt_jax.errors import ConfigError

T = TypeVar("T")


def prefetch(build: Callable[[int], T], start: int, stop: int, threads: int = 2, buffer: int = 8) -> Iterator[T]:
    """`build(start)`, `build(start + 1)`, ..., `build(stop - 1)`, in order, up to `buffer` of them made ahead.

    NumPy lets go of the interpreter lock in its loops, so threads do overlap. An error of `build(n)` is raised when
    element n is asked for. Closing the iterator, or dropping it, ends its threads.

    Args:
        threads: 0 builds each element when it is asked for.
    """
    if threads < 0 or buffer < 0 or (threads > 0 and buffer < 1):
        raise ConfigError(
            f"prefetch: threads = {threads} and buffer = {buffer} must be at least 0, with threads both 1"
        )
    return _elements(build, start, stop, threads, buffer)


def _elements(build: Callable[[int], T], start: int, stop: int, threads: int, buffer: int) -> Iterator[T]:
    if stop <= start:
        return
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer if threads else 0)
    # a pair, because Grain drops elements that are None and writes notes of its own into errors that pass through it
    elements = iter(
        grain.MapDataset.range(start, stop).map(functools.partial(_attempt, build)).to_iter_dataset(options)
    )
    try:
        for element, error in elements:
            if error is not None:
                raise error
            yield element
    finally:
        elements.close()


def _attempt(build: Callable[[int], T], n: int) -> tuple[T | None, Exception | None]:
    """(build(n), None), or (None, the error it raised)."""
    try:
        return build(n), None
    except Exception as error:
        return None, error
