"""Evaluates a run's checkpoint on its held-out text: loss, perplexity, bits per byte, accuracies."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

from bertgpt_jax.commands.common import add_platform, check_platform, command_parser, run_command, select_platform
from bertgpt_jax.errors import UsageError
from bertgpt_jax.training.heap import keep_freed_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/evaluate.py` and `bertgpt evaluate`."""
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("workdir", help="of a run or an import, or a Hugging Face directory")
    parser.add_argument("--which", default="latest", help="latest, best or a step (default: latest)")
    parser.add_argument("--stage", help="whose sequence length and batch to use (default: the checkpoint's)")
    parser.add_argument("--batches", type=int, help="at most this many (default: the whole held-out split)")
    parser.add_argument(
        "--corpus", help="a prepared corpus, if it has moved (of a mixture: name=DIR,...); for others also plain text"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_platform(parser)
    return run_command(_evaluate, parser, argv)


def _evaluate(args: argparse.Namespace) -> int:
    if args.batches is not None and args.batches < 1:
        raise UsageError(f"--batches {args.batches}: must be at least 1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    select_platform(args.platform)
    if check_platform(args.platform) == "cpu":
        keep_freed_memory()
    from bertgpt_jax.evaluation.parameters import evaluate_source, is_run
    from bertgpt_jax.evaluation.workdir import evaluate_workdir

    evaluate = evaluate_workdir if is_run(args.workdir) else evaluate_source
    result = evaluate(args.workdir, args.which, args.stage, args.batches, args.corpus)
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"{args.workdir}, step {result['step']:,}, stage {result['stage']}: {result['rows']:,} held-out rows")
    for name, value in result["metrics"].items():
        print(f"  {name:24} {value:.6f}")
    print(f"  examples and masks are frozen: sha256 {result['evaluation_fingerprint'][:16]}")
    return 0
