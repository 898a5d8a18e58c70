"""`bert_exact FILE --vocab VOCAB`: the training instances of BERT's own script, one JSON object a line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bertgpt_jax.commands.common import Parser, command_parser, run_command
from bertgpt_jax.errors import StorageError, UsageError

_EPILOG = """\
example:
  tools/bert_exact.py text.txt --vocab vocab.txt --dupe-factor 5 --seed 12345 > instances.jsonl

FILE has a sentence a line and a blank line between documents. The instances are those of google-research/bert
create_pretraining_data.py with the same settings, token for token, in the order it writes them; everything is in
memory, so this is for comparing, not for training (tools/prepare.py and tools/train.py do that)."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run_command(_write, _parser(), argv)


def _parser() -> Parser:
    parser = command_parser("bert_exact", "Writes the instances of BERT's create_pretraining_data.py.", _EPILOG)
    parser.add_argument("file", type=Path, metavar="FILE", help="a sentence a line, a blank line between documents")
    parser.add_argument("--vocab", type=Path, required=True, metavar="VOCAB", help="BERT's vocab.txt")
    parser.add_argument("--cased", action="store_true", help="keep case and accents")
    parser.add_argument("--max-seq-length", type=int, default=128, metavar="N", help="tokens of an instance (128)")
    parser.add_argument("--max-predictions", type=int, default=20, metavar="N", help="masks an instance, at most (20)")
    parser.add_argument("--dupe-factor", type=int, default=10, metavar="N", help="passes over the text (10)")
    parser.add_argument("--seed", type=int, default=12345, metavar="N", help="of everything random (12345)")
    parser.add_argument("--whole-word", action="store_true", help="mask the pieces of a word together")
    parser.add_argument("--short-seq-prob", type=float, default=0.1, metavar="P", help="share of short documents (0.1)")
    parser.add_argument("--masked-lm-prob", type=float, default=0.15, metavar="P", help="share of masked tokens (0.15)")
    return parser


def _write(arguments: argparse.Namespace) -> int:
    from bertgpt_jax.batches.bert_exact import ExactSettings, exact_instances, read_exact_documents
    from bertgpt_jax.config import build
    from bertgpt_jax.corpus.exact_wordpiece import ExactWordPiece, read_exact_vocabulary, text_lines

    given = {name: value for name, value in vars(arguments).items() if name in ExactSettings.model_fields}
    settings = build(ExactSettings, given, "bert_exact")
    if not arguments.vocab.is_file():
        raise UsageError(f"--vocab {arguments.vocab}: no such file; give BERT's vocab.txt")
    vocabulary = read_exact_vocabulary(arguments.vocab)
    try:
        data = arguments.file.read_bytes()
    except OSError as error:
        raise StorageError(f"text '{arguments.file}': cannot be read ({error.strerror})") from None
    lines = text_lines(data, str(arguments.file))
    documents = read_exact_documents(lines, ExactWordPiece(vocabulary, arguments.cased))
    instances = exact_instances(documents, list(vocabulary), settings)
    for instance in instances:
        print(json.dumps(instance._asdict(), ensure_ascii=False, sort_keys=True))
    random_next = sum(instance.is_random_next for instance in instances) / len(instances)
    print(
        f"{len(instances):,} instances of {len(documents):,} documents, {random_next:.1%} with a random next sentence",
        file=sys.stderr,
    )
    return 0
