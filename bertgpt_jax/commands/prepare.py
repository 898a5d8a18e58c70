"""`prepare SOURCE... --out DIR [key=value ...]`: text to a tokenised corpus."""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bertgpt_jax.commands.common import command_parser, run_command
from bertgpt_jax.errors import UsageError

_DESCRIPTION = """\
Turns text into a tokenised corpus: reads and cleans the sources, trains the tokenizer (or loads it), tokenises shard by
shard in a process a core, and reports what it kept and dropped. Killed and started again, it goes on where it was."""

_EPILOG = """\
examples:
  tools/prepare.py stdlib --out /tmp/corpus tokenizer.vocab_size=8000
  tools/prepare.py wiki/*.gz --out wiki.corpus tokenizer.path=bert-base-uncased/vocab.txt
  tools/prepare.py books.jsonl --out books tokenizer.kind=byte_bpe text_field=body workers=8
  tools/prepare.py tfds:wikipedia/20230601.en --out en split=train[:10%] data_dir=/data/tfds filters.duplicates=drop
  tools/prepare.py rows.parquet saved_dataset/ --out c filters.language_field=lang 'filters.languages=["en"]'
  zstd -dc pile.txt.zst | tools/prepare.py - --out pile
  tools/prepare.py gs://bucket/wiki --out gs://bucket/wiki.corpus --runner dataflow -- --project=P --region=R
  tools/prepare.py --check wiki.corpus

then train on it with corpus.path=wiki.corpus. Without --out the settings are printed and nothing is written."""


_RUNNERS = ("local", "direct", "dataflow", "spark", "flink")
_RUNNER_HELP = "local: a process a core; the others: Apache Beam, with its own options after `--`"


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = command_parser("prepare", _DESCRIPTION, _EPILOG)
    items_help = "files, directories, globs, 'tfds:NAME', 'stdlib' or '-'; and settings"
    parser.add_argument("items", nargs="*", metavar="SOURCE|key=value", help=items_help)
    parser.add_argument("--out", metavar="DIR", help="the corpus to write: a directory, gs:// or s3://")
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON of corpus settings to start from")
    parser.add_argument("--check", metavar="DIR", help="read a corpus whole and compare every sha256")
    parser.add_argument("--runner", choices=_RUNNERS, default="local", help=_RUNNER_HELP)
    parser.add_argument("--quiet", action="store_true", help="no progress, no report")
    given = sys.argv[1:] if argv is None else argv
    split = given.index("--") if "--" in given else len(given)
    parser.set_defaults(beam_options=tuple(given[split + 1 :]))
    return run_command(_prepare, parser, given[:split])


def _prepare(arguments: argparse.Namespace) -> int:
    from bertgpt_jax.config import apply_overrides, build, parse_json, to_json
    from bertgpt_jax.corpus.builder import prepare_corpus
    from bertgpt_jax.corpus.config import CorpusConfig
    from bertgpt_jax.corpus.reader import CorpusReader

    if arguments.check is not None:
        reader = CorpusReader(arguments.check)
        reader.verify()
        tokens = int(reader.tokens.sum())
        print(f"{arguments.check}: {reader.num_shards} shards, {tokens:,} tokens, every sha256 matches")
        return 0
    overrides = [item for item in arguments.items if re.match(r"[a-z_]+(\.[a-z_]+)*=", item)]
    sources = [item for item in arguments.items if item not in overrides]
    config = CorpusConfig()
    if arguments.config is not None:
        if not arguments.config.is_file():
            raise UsageError(f"--config {arguments.config}: no such file")
        config = build(CorpusConfig, parse_json(arguments.config.read_text("utf-8"), str(arguments.config)), "--config")
    if sources:
        path = sources[0] if len(sources) == 1 else tuple(sources)
        config = build(CorpusConfig, config.model_dump() | {"path": path}, "SOURCE")
    config = apply_overrides(config, overrides) if overrides else config
    if arguments.out is None:
        print(to_json(config), end="")
        return 0
    elsewhere = _elsewhere(arguments, config.workers)
    prepare_corpus(config, arguments.out, progress=not arguments.quiet, elsewhere=elsewhere)
    print(arguments.out)
    return 0


def _elsewhere(arguments: argparse.Namespace, workers: int) -> Callable | None:
    """What tokenises the shards in place of this machine's process pool, if anything."""
    if arguments.runner == "local":
        if arguments.beam_options:
            raise UsageError(f"{arguments.beam_options[0]} after '--' is for Apache Beam; pass --runner as well")
        return None
    from bertgpt_jax.corpus.beam import require_beam, tokenise_shards

    require_beam(arguments.runner)
    return functools.partial(tokenise_shards, runner=arguments.runner, options=arguments.beam_options, workers=workers)
