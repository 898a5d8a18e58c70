"""Exports a model: a directory for Hugging Face transformers, plain arrays, or StableHLO; each proves itself."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from bertgpt_jax.commands.common import add_platform, check_platform, command_parser, run_command, select_platform
from bertgpt_jax.errors import UsageError

EPILOG = """\
examples:
  %(prog)s runs/quickstart --format hf --out quickstart-hf
  %(prog)s runs/gpt2 --format hf --out gpt2-bf16 --dtype bfloat16 --shard-size 2GB --license apache-2.0
  %(prog)s runs/gpt2 --format npz --out gpt2-arrays --which latest
  %(prog)s runs/gpt2 --format stablehlo --out gpt2-program

What was written is read back and compared before the directory gets its name; a mismatch leaves nothing there.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/export.py` and `bertgpt export`."""
    parser = command_parser("export", __doc__, EPILOG)
    parser.add_argument("source", metavar="WORKDIR", help="the workdir of a run, or a Hugging Face directory")
    parser.add_argument("--format", choices=("hf", "npz", "stablehlo"), required=True)
    parser.add_argument("--out", required=True, help="a directory that does not exist yet")
    parser.add_argument("--which", default="best", help="best, latest or a step (default: best)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shard-size", default="5GB", help="hf: largest file of tensors (default: 5GB)")
    parser.add_argument("--license", default="unknown", help="hf: of the model, for its card (default: unknown)")
    parser.add_argument("--proof", choices=("auto", "transformers", "numpy"), default="auto", help="hf: compare with")
    parser.add_argument("--proof-layers", type=int, metavar="N", help="hf: compare the outputs of N layers only")
    add_platform(parser)
    return run_command(_export, parser, argv)


def _export(args: argparse.Namespace) -> int:
    if args.proof_layers is not None and args.proof_layers < 1:
        raise UsageError(f"--proof-layers {args.proof_layers}: must be at least 1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    select_platform(args.platform)
    check_platform(args.platform)
    from bertgpt_jax.transfer.load import open_source
    from bertgpt_jax.transfer.target import parse_size

    shard_bytes = parse_size(args.shard_size)
    source = open_source(args.source, args.which)
    print(f"exporting {source.label} as {args.format}, {args.dtype}", flush=True)
    if args.format == "npz":
        from bertgpt_jax.transfer.npz import export_npz

        arrays = export_npz(source, args.out, args.dtype)
        print(f"finished: {arrays} arrays by path in {args.out}/params.npz, read back and equal")
        print(f"  next: numpy.load('{args.out}/params.npz')")
        return 0
    if args.format == "stablehlo":
        from bertgpt_jax.transfer.stablehlo import export_stablehlo

        for line in export_stablehlo(source, args.out, args.dtype):
            print(line)
        return 0
    from bertgpt_jax.training.storage import workdir_path
    from bertgpt_jax.transfer.export import export_hf
    from bertgpt_jax.transfer.trained_on import corpus_totals

    data = corpus_totals(workdir_path(args.source), source.meta) if source.meta else {}
    proof = export_hf(source, args.out, args.dtype, shard_bytes, args.proof, args.proof_layers, args.license, data)
    outputs = proof["outputs"]
    print(f"  {proof['tensors_equal']} tensors read back: every bit as in the checkpoint")
    print(
        f"  {proof['reference']}: {proof['layers']} of {proof['layers_of_model']} layers, logits differ by "
        f"{outputs['logits']:.1e} at most, loss {outputs['loss']['ours']:.6f} "
        f"and {outputs['loss'][proof['reference']]:.6f}"
    )
    print(f"finished: {args.out}")
    print(f"  next: transformers' from_pretrained('{args.out}'), or bertgpt evaluate {args.out} --corpus DIR")
    return 0
