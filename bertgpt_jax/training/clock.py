"""The rates of a run: tokens and steps a second, utilisation, time waiting for data, time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

from bertgpt_jax.training.hardware import peak_flops


class Clock:
    """Rates of the time since the last row; what is spent in evaluation and saving is left out.

    Args:
        total_steps: of the run, for the time left.
    """

    def __init__(self, total_steps: int):
        self.tokens = 0
        self._total, self._steps = total_steps, None
        self._since, self._waited, self._out = time.perf_counter(), 0.0, 0.0
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * jax.device_count() if peak else None

    def waiting_for_data(self) -> _Span:
        """Context in which the step waits for its batch."""
        return _Span(lambda seconds: setattr(self, "_waited", self._waited + seconds))

    def paused(self) -> _Span:
        """Context whose time counts for no rate."""
        return _Span(lambda seconds: setattr(self, "_out", self._out + seconds))

    def interval(self, step: int, flops: tuple[float, float]) -> dict[str, float]:
        """Rates since the last call; empty for the first, which holds start-up."""
        now = time.perf_counter()
        seconds = max(now - self._since - self._out, 1e-9)
        steps = step - self._steps if self._steps is not None else 0
        rates = {}
        if steps > 0:
            per_second = self.tokens / seconds
            rates = {
                "throughput/tokens_per_second": per_second,
                "throughput/step_seconds": seconds / steps,
                "throughput/data_wait": self._waited / seconds,
                "throughput/eta_seconds": (self._total - step) * seconds / steps,
            }
            if self._peak:
                rates["throughput/mfu"] = per_second * flops[0] / self._peak
                rates["throughput/mfu_full_attention"] = per_second * flops[1] / self._peak
        self._steps, self._since = step, now
        self.tokens, self._waited, self._out = 0, 0.0, 0.0
        return rates


class _Span:
    """Measures the time spent in a `with` block."""

    def __init__(self, add: Callable[[float], None]):
        self._add = add

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self._add(time.perf_counter() - self._start)
