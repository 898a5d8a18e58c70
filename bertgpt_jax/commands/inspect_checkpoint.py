"""Shows what a workdir's checkpoints hold, compares two, or converts one, without building the model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from bertgpt_jax.commands.common import add_platform, check_platform, command_parser, run_command, select_platform
from bertgpt_jax.errors import UsageError

EPILOG = """\
examples:
  %(prog)s runs/quickstart
  %(prog)s --diff runs/a runs/b
  %(prog)s runs/gpt2 --convert gpt2-layers --layers unstacked --dtype bfloat16
  %(prog)s gpt2-layers --convert gpt2-stacked --layers stacked
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/inspect_checkpoint.py` and `bertgpt inspect_checkpoint`."""
    parser = command_parser("inspect_checkpoint", __doc__, EPILOG)
    parser.add_argument("source", nargs="?", metavar="WORKDIR", help="a workdir, a Hugging Face directory, or an npz's")
    parser.add_argument("--verify", action="store_true", help="read every array and compare its fingerprint")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="what differs from A to B")
    parser.add_argument("--which", default="latest", help="for --diff and --convert: best, latest or a step")
    parser.add_argument("--convert", metavar="OUT", help="write the parameters as params.npz into this new directory")
    parser.add_argument("--layers", choices=("stacked", "unstacked"), default="stacked", help="for --convert")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="for --convert")
    add_platform(parser)
    return run_command(_inspect, parser, argv)


def _inspect(args: argparse.Namespace) -> int:
    if (args.source is None) == (args.diff is None):
        raise UsageError("give either a WORKDIR or --diff A B")
    if args.diff and args.convert:
        raise UsageError("--diff and --convert are two things to do; give one")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    platform = "cpu" if args.platform == "auto" else args.platform  # it reads, and computes little
    select_platform(platform)
    check_platform(platform)
    from bertgpt_jax.transfer import inspect, npz
    from bertgpt_jax.transfer.load import open_source

    if args.convert:
        source = open_source(args.source, args.which)
        count = npz.export_npz(source, args.convert, args.dtype, stacked=args.layers == "stacked")
        print(f"finished: {count} arrays, {args.layers}, {args.dtype}, in {args.convert}/params.npz")
        print(f"  next: every tool that takes a workdir takes {args.convert}")
        return 0
    lines = inspect.diff(*args.diff, args.which) if args.diff else inspect.describe(args.source, verify=args.verify)
    print("\n".join(lines))
    return 0
