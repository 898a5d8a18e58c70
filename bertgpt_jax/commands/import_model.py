"""Imports a model of Hugging Face transformers (or a minGPT JSON) as a workdir that every tool here takes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from bertgpt_jax.commands.common import add_platform, check_platform, command_parser, run_command, select_platform
from bertgpt_jax.errors import UsageError

EPILOG = """\
examples:
  hf download google-bert/bert-base-uncased --local-dir bert-base
  %(prog)s bert-base --out runs/bert-base
  bertgpt evaluate runs/bert-base --corpus wiki
  bertgpt train continue/bert init_from=bert-base corpus.path='texts/*.txt' --workdir runs/mine
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/import_model.py` and `bertgpt import_model`."""
    parser = command_parser("import_model", __doc__, EPILOG)
    parser.add_argument("source", help="a Hugging Face directory with safetensors, or a .json(.gz) in minGPT's layout")
    parser.add_argument("--out", required=True, metavar="WORKDIR", help="a workdir that does not exist yet")
    parser.add_argument("--tokenizer", metavar="DIR", help="use this one instead of the model's own")
    parser.add_argument("--tokenizer-kind", default="", help="of --tokenizer: wordpiece, byte_bpe, sentencepiece, ...")
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the model's own out")
    add_platform(parser)
    return run_command(_import, parser, argv)


def _import(args: argparse.Namespace) -> int:
    if args.tokenizer and args.no_tokenizer:
        raise UsageError("--tokenizer and --no-tokenizer contradict each other; give one")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    select_platform(args.platform)
    check_platform(args.platform)
    from bertgpt_jax.transfer.import_model import import_model, open_foreign, with_other_tokenizer

    source = open_foreign(args.source, with_tokenizer=not (args.no_tokenizer or args.tokenizer))
    if args.tokenizer:
        source = with_other_tokenizer(source, args.tokenizer, args.tokenizer_kind)
    config = import_model(source, args.out)
    model, tokenizer = config.model, source.tokenizer
    print(f"{model.kind}, {model.num_layers} layers, width {model.hidden_size}, vocabulary {model.vocab_size:,}")
    print(f"  tokenizer: {'none' if tokenizer is None else f'{tokenizer.kind}, {tokenizer.vocab_size:,} ids'}")
    print(f"finished: the checkpoint of step 0 in {args.out}")
    print(f"  next: bertgpt evaluate {args.out} --corpus DIR, or a run with init_from={args.out}")
    return 0
