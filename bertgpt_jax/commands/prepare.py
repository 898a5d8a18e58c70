"""`prepare SOURCE... --out DIR [key=value ...]`: text to a tokenised corpus."""

from __future__ import annotations

import argparse
import re
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
  tools/prepare.py --check wiki.corpus

then train on it with corpus.path=wiki.corpus. Without --out the settings are printed and nothing is written."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = command_parser("prepare", _DESCRIPTION, _EPILOG)
    items_help = "files, directories, globs or 'stdlib'; and settings"
    parser.add_argument("items", nargs="*", metavar="SOURCE|key=value", help=items_help)
    parser.add_argument("--out", type=Path, metavar="DIR", help="the corpus to write")
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON of corpus settings to start from")
    parser.add_argument("--check", type=Path, metavar="DIR", help="read a corpus whole and compare every sha256")
    parser.add_argument("--quiet", action="store_true", help="no progress, no report")
    return run_command(_prepare, parser, argv)


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
    prepare_corpus(config, arguments.out, progress=not arguments.quiet)
    print(arguments.out)
    return 0
