"""How runs stand: a line for each workdir, and an exit code for whatever watches them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from bertgpt_jax.commands.common import command_parser, run_command
from bertgpt_jax.errors import ConfigError, Diverged, PeerError

EPILOG = """\
examples:
  %(prog)s runs/*
  %(prog)s gs://bucket/bert-base || page-somebody
  %(prog)s runs/bert-base --json

A run is stalled if its own watch says so, if STATUS.json, which a run refreshes every 30 seconds, is older than
--silent-minutes (its process is gone), or if no step has ended for --still-minutes and for 10 times the usual step.

exit codes: 0 every run goes on or has ended as it should   76 one is stalled or failed   77 one diverged
            78 a directory holds no run
"""

WELL = ("running", "finished", "preempted", "interrupted")
COLUMNS = ("workdir", "state", "step", "done", "eta", "s/step", "loss", "checkpoint", "age", "refreshed")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/status.py` and `bertgpt status`."""
    parser = command_parser("status", __doc__, EPILOG)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of the table")
    parser.add_argument("--silent-minutes", type=float, default=5.0, help="how old STATUS.json may be (default 5)")
    parser.add_argument("--still-minutes", type=float, default=30.0, help="how long a step may take (default 30)")
    return run_command(_status, parser, argv)


def _status(args: argparse.Namespace) -> int:
    from bertgpt_jax.training.status import read_status
    from bertgpt_jax.training.storage import workdir_path

    rows = []
    for name in args.workdirs:
        found = read_status(workdir_path(name))
        rows.append(describe(name, found, time.time(), 60 * args.silent_minutes, 60 * args.still_minutes))
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print(table(rows))
    for row in rows:
        if row["why"]:
            print(f"{row['workdir']}: {row['why']}", file=sys.stderr)
    return exit_code([row["state"] for row in rows])


def exit_code(states: Sequence[str]) -> int:
    """The most urgent of what the states call for."""
    for state, code in (("stalled", PeerError), ("failed", PeerError), ("diverged", Diverged), ("no run", ConfigError)):
        if state in states:
            return code.exit_code
    return 0


def describe(workdir: str, status: dict[str, Any] | None, now: float, silent: float, still: float) -> dict[str, Any]:
    """A run in a row: the columns of the table with plain numbers, seconds for times, and `why` it is not well.

    Args:
        status: its STATUS.json.
        now: seconds since 1970.
        silent: seconds without a refresh after which a run that says it goes on does not.
        still: seconds without a step, likewise.
    """
    from bertgpt_jax.training.status import status_problem

    row: dict[str, Any] = dict.fromkeys([*COLUMNS, "total_steps", "doing", "moved"]) | {"workdir": workdir, "why": ""}
    if status is None:
        return row | {"state": "no run", "why": "there is no STATUS.json that can be read"}
    problem = status_problem(status)
    if problem:
        return row | {"state": "no run", "why": f"its STATUS.json is not what a run writes: {problem}"}
    progress = status.get("progress") or {}
    refreshed = now - datetime.fromisoformat(status["time"]).timestamp()
    total, saved = progress.get("total_steps"), progress.get("checkpoint", status.get("latest"))
    row |= {"state": status["reason"], "step": status["step"], "total_steps": total, "refreshed": refreshed}
    row |= {"done": status["step"] / total if total else None, "loss": status["metrics"].get("train/loss")}
    row |= {"checkpoint": saved, "why": status["message"] if status["reason"] not in WELL else ""}
    if status["reason"] not in ("running", "stalled"):
        return row
    saved_at, moved = progress.get("checkpoint_time"), progress.get("moved")
    row |= {"eta": progress.get("eta_seconds"), "s/step": progress.get("step_seconds"), "doing": progress.get("doing")}
    row |= {"age": saved_at and now - saved_at, "moved": moved and now - moved}
    if status["reason"] == "running":
        row["why"] = _stalled(row, silent, still)
        row["state"] = "stalled" if row["why"] else "running"
    return row


def _stalled(row: dict[str, Any], silent: float, still: float) -> str:
    """Why a run that says it goes on does not; empty if it does."""
    from bertgpt_jax.training.metrics import duration

    if row["refreshed"] > silent:
        return f"STATUS.json was not refreshed for {duration(row['refreshed'])}: its process is gone or cannot write"
    expected = row["doing"] not in (None, "starting", "compiling")
    if expected and (row["moved"] or 0) > max(still, 10 * (row["s/step"] or 0)):
        return f"nothing has moved for {duration(row['moved'])} at step {row['step']:,} ({row['doing']})"
    return ""


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in aligned columns."""
    lines = [COLUMNS, *([_cell(row, column) for column in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(row: dict[str, Any], column: str) -> str:
    from bertgpt_jax.training.metrics import duration, short_number

    value = row[column]
    if value is None:
        return "-"
    if column == "state" and value == "running" and row["doing"] not in (None, "training"):
        return str(row["doing"])
    if column == "step":
        return f"{value:,}" + (f"/{row['total_steps']:,}" if row["total_steps"] else "")
    if column == "done":
        return f"{100 * value:.0f}%"
    if column in ("eta", "age", "refreshed"):
        return duration(value) + (" ago" if column != "eta" else "")
    return short_number(value) if column in ("loss", "s/step") else str(value)
