"""Where the numbers of a run go: rows of JSON, TensorBoard, one console line an interval, a progress bar.

`metrics.jsonl` holds only what the run computes, never a clock: the file of a run that was killed and resumed equals
that of an undisturbed one, byte for byte. Rates and waits go to `timing.jsonl`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from tqdm import tqdm

from bertgpt_jax.training import processes, storage
from bertgpt_jax.training.rows import RowLog, to_number
from bertgpt_jax.training.trackers import TensorBoard, Tracker, WeightsAndBiases

log = logging.getLogger(__name__)

# ---------------------------------------------------------------- the console


def short_number(value: float) -> str:
    """4 digits: `3.214`, `12.3k`, `1.24M`."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """`42s`, `3m10s`, `5h04m`, `2d03h`; `?` if it is not known yet."""
    if not math.isfinite(seconds):
        return "?"
    total = max(0, round(seconds))
    for unit, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if total >= unit:
            return f"{total // unit}{name}{total % unit // part:02d}{part_name}"
    return f"{total // 60}m{total % 60:02d}s" if total >= 60 else f"{total}s"


def _field(name: str, value: Any) -> str:
    if isinstance(value, str) or value is None:
        return f"{name} {'-' if value is None else value}"
    value = float(value)
    if name == "eta":
        return f"eta {duration(value)}"
    if not math.isfinite(value):
        return f"{name} {value}"
    if name.endswith("/s"):
        return f"{short_number(value)} {name}"
    if name in ("data", "mfu") or name.startswith("mfu"):
        return f"{name} {100 * value:.0f}%" if value == 0 or value >= 0.1 else f"{name} {100 * value:.2g}%"
    if name == "lr":
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"lr {mantissa}e{int(exponent)}" if value else "lr 0"
    return f"{name} {short_number(value)}"


def console_line(step: int, total_steps: int | None, fields: Mapping[str, Any]) -> str:
    """`step 120/2,000 | loss 3.214 | lr 1.0e-4 | 12.3k tok/s | data 2% | eta 3m10s`.

    Fields are named as they are shown and come in the order given; some names say how: `*/s` a rate, `data` and `mfu*`
    a fraction shown in percent, `lr` in powers of ten, `eta` seconds. Strings are shown as they are.
    """
    head = f"step {step:,}" + (f"/{total_steps:,}" if total_steps else "")
    return " | ".join([head, *(_field(name, value) for name, value in fields.items())])


# ---------------------------------------------------------------- everything together


class MetricWriter:
    """Writes a run's numbers; in any process but the first it only remembers the last values.

    Trouble with storage or a tracker is one warning, never the end of a run; rows are tried again at the next flush.

    Args:
        workdir: where; made if missing.
        restored_step: the step training goes on from; rows of later steps are dropped. None: a fresh start drops all.
        total_steps: for the console line and the progress bar.
        tensorboard: also write TensorBoard events, if the workdir is local.
        wandb_project: also log to this Weights & Biases project.
        flush_seconds: rows are at most this old in memory.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        restored_step: int | None = None,
        total_steps: int | None = None,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        flush_seconds: float = 10.0,
    ):
        self.last: dict[str, float | int | None] = {}
        self._primary = processes.is_primary()
        self._total = total_steps
        self._flush_seconds, self._flushed_at = flush_seconds, time.monotonic()
        self._warned = False
        self._bar: tqdm[Any] | None = None
        self._trackers: list[Tracker] = []
        if not self._primary:
            return
        storage.make_directory(workdir)
        self._metrics = RowLog(workdir, "metrics", restored_step)
        self._timing = RowLog(workdir, "timing", restored_step)
        for row in self._metrics.rows():
            self.last.update({k: v for k, v in row.items() if k != "step"})
        if tensorboard and storage.is_local(workdir):
            with self._warning("TensorBoard events are not written"):
                self._trackers.append(TensorBoard(workdir, restored_step))
        if wandb_project is not None:
            with self._warning("nothing is sent to wandb"):
                self._trackers.append(WeightsAndBiases(workdir, wandb_project))
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=restored_step or 0, unit="step", file=sys.stderr, leave=False)

    @contextlib.contextmanager
    def _warning(self, what: str) -> Any:
        """Makes any error within one warning for the whole run."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                log.warning("%s: %s; training goes on", what, error)
            self._warned = True

    def log(self, step: int, values: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """A row of `values` (no clocks) to `metrics.jsonl`, one of `timing` to `timing.jsonl`, both to the trackers."""
        self.last.update({key: to_number(value) for key, value in values.items()})
        if not self._primary:
            return
        rows = [self._metrics.append(step, values)] if values else []
        rows += [self._timing.append(step, timing)] if timing else []
        for tracker in self._trackers:
            with self._warning(f"{type(tracker).__name__} gets nothing"):
                for row in rows:
                    tracker.log(step, {k: v for k, v in row.items() if k != "step" and v is not None})
        if time.monotonic() - self._flushed_at >= self._flush_seconds:
            self._write(RowLog.flush)

    def _write(self, action: Any) -> None:
        for rows in (self._metrics, self._timing):
            with self._warning("metrics are not written"):
                action(rows)
        self._flushed_at = time.monotonic()

    def join(self) -> None:
        """Makes rows durable and `metrics.jsonl` complete: before every save, after every evaluation, at the end."""
        if self._primary:
            self._write(RowLog.join)

    def print(self, step: int, fields: Mapping[str, Any]) -> None:
        """One console line (see `console_line`), above the progress bar if there is one."""
        self.say(console_line(step, self._total, fields))

    def say(self, text: str) -> None:
        """A line of text to the console, from the first process only."""
        if not self._primary:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def tick(self, step: int) -> None:
        """Moves the progress bar; cheap, for every step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """`join`, and closes the bar and the trackers."""
        self.join()
        if self._bar is not None:
            self._bar.close()
        for tracker in self._trackers:
            with self._warning(f"{type(tracker).__name__} is not closed"):
                tracker.close()
