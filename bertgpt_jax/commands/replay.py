"""Prints what a step of a run was made of: documents, where they come from, decoded text, masks."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence

from bertgpt_jax.commands.common import command_parser, run_command, select_platform
from bertgpt_jax.errors import UsageError

_EPILOG = """\
Steps are those of metrics.jsonl: --step 1200 shows the batch behind the row of step 1200. Nothing is read but the run's
config and its corpus, so any step can be replayed, on any machine, also one that is still to come.

examples:
  %(prog)s runs/bert --step 1200 --rows 0-3
  %(prog)s runs/bert --step 1200 --process 2/8 --json     what the third of eight hosts built"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/replay.py` and `bertgpt replay`."""
    parser = command_parser("replay", __doc__ or "", _EPILOG)
    parser.add_argument("workdir", help="of a run")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the N of metrics.jsonl, from 1")
    parser.add_argument("--rows", metavar="LIST", help="of the global batch, such as 0,4-7 (default: all)")
    parser.add_argument("--process", metavar="I/N", help="only the rows that process I of N builds, I from 0")
    parser.add_argument("--corpus", help="the prepared corpus, if it has moved (of a mixture: name=DIR,...)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return run_command(_replay, parser, argv)


def _replay(args: argparse.Namespace) -> int:
    rows = parse_rows(args.rows) if args.rows is not None else None
    process = parse_process(args.process) if args.process is not None else None
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    select_platform("cpu")
    from bertgpt_jax.evaluation.replay import lines, replay

    found = replay(args.workdir, args.step, rows, process, args.corpus)
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print("\n".join(lines(found)))
    return 0


def parse_rows(text: str) -> list[int]:
    """Numbers of `0,4-7`; UsageError for anything else."""
    rows: list[int] = []
    for item in text.split(","):
        matched = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", item.strip())
        if matched is None or int(matched[2] or matched[1]) < int(matched[1]):
            raise UsageError(f"--rows '{text}': '{item}' is neither a row nor a range such as 4-7")
        rows += range(int(matched[1]), int(matched[2] or matched[1]) + 1)
    return rows


def parse_process(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`; UsageError for anything else."""
    matched = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if matched is None:
        raise UsageError(f"--process '{text}' is not I/N, such as 2/8")
    return int(matched[1]), int(matched[2])
