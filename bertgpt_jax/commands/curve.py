"""Draws the learning curves of one or more workdirs to a PNG, with the numbers beside it as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bertgpt_jax.commands.common import command_parser, run_command
from bertgpt_jax.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/curve.py` and `bertgpt curve`."""
    parser = command_parser("curve", __doc__)
    parser.add_argument("workdirs", nargs="+", help="of runs")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture; FILE.json gets the numbers")
    parser.add_argument(
        "--line", action="append", default=[], metavar="NAME=VALUE", help="a reference line in the loss panel"
    )
    return run_command(_curve, parser, argv)


def _curve(args: argparse.Namespace) -> int:
    from bertgpt_jax.evaluation.curves import curves, draw

    out = Path(args.out)
    if out.suffix != ".png":
        raise UsageError(f"--out '{out}' must end in .png")
    lines = {}
    for item in args.line:
        name, _, value = item.partition("=")
        try:
            lines[name] = float(value)
        except ValueError:
            raise UsageError(f"--line '{item}' is not NAME=NUMBER") from None
    found = curves(args.workdirs)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(found, out, lines)
    numbers = out.with_suffix(".json")
    numbers.write_text(json.dumps({"lines": lines, "runs": found}, indent=1) + "\n")
    print(f"{out} and {numbers}: {', '.join(found)}")
    return 0
