"""Guesses masked tokens with a BERT or RoBERTa; with --generate, shows why it is no generator of text."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from bertgpt_jax.commands.common import add_platform, check_platform, command_parser, run_command, select_platform
from bertgpt_jax.errors import ConfigError, DataError, UsageError

EPILOG = """\
examples:
  %(prog)s bert-base-uncased "The capital of France is [MASK]."
  %(prog)s roberta-base "The capital of France is <mask>, of Spain <mask>." --top-k 3
  %(prog)s bert-base-uncased "The capital of France" --generate 12 --method unmask
  %(prog)s bert-base-uncased --generate 12 --method gibbs --sweeps 20 --seed 1

A mask is written [MASK] or <mask>, whatever the vocabulary calls it. Several masks are guessed apart, each with the
others still masked.

A masked model is no generator: its guesses are not the conditionals of one distribution over texts. --generate shows
it: after the text stands the log-probability that the model gives it by the chain rule, from left to right and from
right to left. One distribution would give one number. `unmask` fills N masks, the surest guess first; `gibbs` draws
each token anew given all others, --sweeps times.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/fill_mask.py` and `bertgpt fill_mask`."""
    parser = command_parser("fill_mask", __doc__, EPILOG)
    parser.add_argument("model", metavar="WORKDIR", help="the workdir of a run, or a Hugging Face directory")
    parser.add_argument("text", nargs="?", default="", help="with masks; with --generate, how the text begins")
    parser.add_argument("--which", default="best", help="best, latest or a step of a run (default: best)")
    parser.add_argument("--top-k", type=int, metavar="K", help="guesses to show (default: 5), or to draw from")
    parser.add_argument("--allow-unknown", action="store_true", help="let [UNK] stand for what the vocabulary lacks")
    write = parser.add_argument_group("writing text")
    write.add_argument("--generate", type=int, metavar="N", help="write N tokens")
    write.add_argument("--method", choices=("unmask", "gibbs"), default="unmask")
    write.add_argument("--sweeps", type=int, help="gibbs: how often every token is drawn (default: 10)")
    write.add_argument("--temperature", type=float, help="of the draws (default: 0 for unmask, 1 for gibbs)")
    write.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_platform(parser)
    return run_command(_fill_mask, parser, argv)


def _fill_mask(args: argparse.Namespace) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    select_platform(args.platform)
    check_platform(args.platform)
    _check(args)
    from bertgpt_jax.generation.masked import MaskedModel, encode_masked, fill_masks
    from bertgpt_jax.transfer.load import open_source
    from bertgpt_jax.transfer.source import nested

    source = open_source(args.model, args.which)
    if source.model_config.kind != "bert":
        raise ConfigError(f"{source.label} is a {source.model_config.kind}, which has no masks; see tools/generate.py")
    if source.tokenizer is None:
        raise DataError(f"{source.label} has no tokenizer, so that no text can be read")
    model = MaskedModel(source.model_config, source.tokenizer.vocab_size, args.dtype)
    if args.generate is not None:
        return _write(args, model, source)
    ids, _ = encode_masked(source.tokenizer, args.text, args.allow_unknown)
    model.check_length(len(ids))
    params = nested(source.read(list(source.leaves)))
    guesses = fill_masks(model, params, source.tokenizer, args.text, args.top_k or 5, args.allow_unknown)
    if args.json:
        masks = [[guess._asdict() for guess in mask] for mask in guesses]
        print(json.dumps({"text": args.text, "masks": masks}, ensure_ascii=False, indent=2))
        return 0
    print(source.label, file=sys.stderr)
    for number, mask in enumerate(guesses, start=1):
        print(f"mask {number}:")
        for guess in mask:
            print(f"  {guess.probability:8.4f}  {guess.token}  ({guess.id})")
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("top_k", "generate", "sweeps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed {args.seed}: must be between 0 and 2^32 - 1")
    if args.generate is None and not args.text.strip():
        raise UsageError("no text; give one with a [MASK] in it, or --generate N")
    if args.sweeps is not None and (args.generate is None or args.method != "gibbs"):
        raise UsageError(f"--sweeps {args.sweeps}: is of --generate N --method gibbs")
    if args.temperature is not None and args.generate is None:
        raise UsageError(f"--temperature {args.temperature}: is of --generate N; guesses are not drawn")


def _write(args: argparse.Namespace, model: Any, source: Any) -> int:
    """Text by unmasking or Gibbs sampling, and the proof that it comes from no distribution."""
    import numpy as np

    from bertgpt_jax.config import build
    from bertgpt_jax.generation.masked_text import MaskedWriter
    from bertgpt_jax.generation.prompts import check_known
    from bertgpt_jax.generation.sampling import Sampling
    from bertgpt_jax.transfer.source import nested

    tokenizer, special = source.tokenizer, source.tokenizer.special
    special.require("cls", "sep", "mask", purpose="writing with masks")
    temperature = args.temperature if args.temperature is not None else float(args.method == "gibbs")
    sampling = build(Sampling, {"temperature": temperature, "top_k": args.top_k}, "options")
    begins = tokenizer.encode(args.text)
    check_known(tokenizer, args.text, begins, repr(args.text), args.allow_unknown)
    ids = np.array([special.cls, *begins, *[special.mask] * args.generate, special.sep], np.int32)
    free = np.arange(1 + len(begins), len(ids) - 1, dtype=np.int32)
    model.check_length(len(ids))
    params = nested(source.read(list(source.leaves)))
    writer = MaskedWriter(model, params, sampling, tokenizer.special_mask(), special.mask, args.seed)
    order: list[int] = []
    if args.method == "unmask":
        ids, order = writer.unmask(ids, free)
    else:
        ids = writer.gibbs(ids, free, args.sweeps or 10)
    forward, backward = writer.both_orders(ids, free)
    text, apart = tokenizer.decode(ids[1:-1]), min(abs(forward - backward), 700.0)
    if args.json:
        found = {
            "text": text,
            "method": args.method,
            "order": order,
            "log_p": {"forward": forward, "backward": backward},
        }
        print(json.dumps(found, ensure_ascii=False, indent=2))
        return 0
    print(source.label, file=sys.stderr)
    print(text)
    if order:
        print("filled in this order: " + " ".join(tokenizer.token(int(ids[at])) for at in order))
    print(f"log P of these tokens: {forward:.2f} from left to right, {backward:.2f} from right to left. A distribution")
    print(f"over texts would give one number; these two probabilities differ by a factor of {math.exp(apart):.3g}.")
    return 0
