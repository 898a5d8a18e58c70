"""Describes a corpus, or a config's corpora and the examples made of them: as text, JSON and a picture."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertgpt_jax.commands.common import check_outputs, command_parser, run_command, select_platform
from bertgpt_jax.errors import UsageError

_EPILOG = """\
Lengths, unknown tokens, duplicates, languages (where the source was filtered by language), sources, frequent tokens;
and of examples padding, masks, random next sentences and how full packed rows are.

examples:
  %(prog)s wiki.corpus --length 512
  %(prog)s configs/bert/base.py corpus.path=wiki.corpus --out docs/wiki.png --json wiki.json"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/corpus_report.py` and `bertgpt corpus_report`."""
    parser = command_parser("corpus_report", __doc__ or "", _EPILOG)
    parser.add_argument("target", metavar="CORPUS|CONFIG", help="a prepared corpus, a config file or a shipped config")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to the config")
    parser.add_argument("--length", type=int, default=128, help="of the examples of a corpus (default: 128)")
    parser.add_argument("--rows", type=int, default=20_000, help="examples counted of each kind (default: 20000)")
    parser.add_argument("--top", type=int, default=20, help="frequent tokens and large sources listed (default: 20)")
    parser.add_argument("--corpora", help="where a config's text is prepared if it is no prepared corpus")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers there")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="also draw a picture")
    return run_command(_report, parser, argv)


def _report(args: argparse.Namespace) -> int:
    for name, least in (("length", 8), ("rows", 1), ("top", 1)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.out is not None and args.out.suffix != ".png":
        raise UsageError(f"--out '{args.out}' must end in .png")
    check_outputs(args.json, args.out)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    select_platform("cpu")
    from bertgpt_jax.evaluation import corpus_report

    report = _make(args)
    print("\n".join(corpus_report.lines(report)))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if args.out:
        corpus_report.draw(report, args.out)
    written = " and ".join(str(path) for path in (args.json, args.out) if path)
    print(f"written: {written}" if written else "--json FILE and --out FILE.png keep this")
    return 0


def _make(args: argparse.Namespace) -> dict[str, Any]:
    from bertgpt_jax.config import load_config
    from bertgpt_jax.evaluation.corpus_report import config_report, corpus_report
    from bertgpt_jax.training.run_config import RunConfig

    if Path(args.target).is_dir():
        if args.overrides:
            raise UsageError(f"'{args.overrides[0]}' changes a config, and {args.target} is a corpus")
        return corpus_report(Path(args.target), args.length, args.rows, args.top)
    config = load_config(args.target, RunConfig, args.overrides)
    with tempfile.TemporaryDirectory() as thrown_away:
        return config_report(config, Path(args.corpora or thrown_away), args.rows, args.top)
