"""`tokenizer train|encode|decode|check`: train a tokenizer, use it, and see what it loses of a text."""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bertgpt_jax.commands.common import Parser, command_parser, run_command
from bertgpt_jax.errors import ConfigError, UsageError

_EPILOG = """\
examples:
  tools/tokenizer.py train stdlib --out tok tokenizer.vocab_size=8000
  tools/tokenizer.py train wiki/ --sample 20000 --out tok tokenizer.kind=byte_bpe
  tools/tokenizer.py encode tok "Text in, ids out." --pieces
  tools/tokenizer.py decode tok 17 4 256
  tools/tokenizer.py check tok wiki/ --sample 1000

TOKENIZER is a directory that train wrote, or a prepared corpus, or published files with --kind: a vocab.txt, a
directory with encoder.json and vocab.bpe, a .model file."""


_VERBS = {
    "train": "train on the train documents of a source and save",
    "encode": "text to ids",
    "decode": "ids to text",
    "check": "what is lost of a text",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in _VERBS:
        actions = {"train": _train, "encode": _encode, "decode": _decode, "check": _check}
        return run_command(actions[argv[0]], _parser(argv[0]), argv[1:])
    table = "".join(f"  {verb:8} {text}\n" for verb, text in _VERBS.items())
    parser = command_parser("tokenizer", "Trains tokenizers and shows what they do.", f"verbs:\n{table}\n{_EPILOG}")
    parser.add_argument("verb", choices=list(_VERBS), metavar="train|encode|decode|check")
    return run_command(lambda arguments: 0, parser, argv)


def _parser(verb: str) -> Parser:
    parser = command_parser(f"tokenizer {verb}", f"{_VERBS[verb].capitalize()}.", _EPILOG)
    if verb == "train":
        parser.add_argument("source", help="a file, directory, glob or 'stdlib'")
        parser.add_argument("settings", nargs="*", metavar="key=value", help="corpus settings: tokenizer.kind=byte_bpe")
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to save it")
        parser.add_argument("--sample", type=int, metavar="N", help="train on at most N documents, from all over")
        return parser
    parser.add_argument("tokenizer", help="a saved tokenizer, a prepared corpus, or published files (with --kind)")
    parser.add_argument("--kind", help="kind of published files: wordpiece, byte_bpe, sentencepiece, characters")
    parser.add_argument("--cased", action="store_true", help="published WordPiece: keep case and accents")
    if verb == "check":
        parser.add_argument("source", help="a file, directory, glob or 'stdlib'")
        parser.add_argument("--sample", type=int, default=1000, metavar="N", help="documents to look at (1000)")
    else:
        parser.add_argument("values", nargs="*", help="given here, or line by line on standard input")
    if verb == "encode":
        parser.add_argument("--pieces", action="store_true", help="print spellings; | marks the start of a word")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from bertgpt_jax.config import apply_overrides, build
    from bertgpt_jax.corpus.builder import sample_texts
    from bertgpt_jax.corpus.config import CorpusConfig
    from bertgpt_jax.corpus.kinds import train_tokenizer
    from bertgpt_jax.corpus.plan import find_request, make_plan

    if arguments.sample is not None and arguments.sample < 1:
        raise UsageError(f"--sample {arguments.sample}: must be at least 1 document")
    if arguments.out.exists() and any(arguments.out.iterdir()):
        raise ConfigError(f"--out {arguments.out} is not empty; choose a new directory")
    config = apply_overrides(CorpusConfig(), arguments.settings)
    config = build(CorpusConfig, config.model_dump() | {"path": arguments.source}, "source")
    if config.tokenizer.path:
        raise UsageError(f"tokenizer.path = '{config.tokenizer.path}' is to load; train makes a new one, drop it")
    documents = arguments.sample or 1 << 62
    texts = sample_texts(make_plan(config, *find_request(config)), None, config.tokenizer.sample_bytes, documents)
    tokenizer = train_tokenizer(texts, config.tokenizer)
    tokenizer.save(arguments.out)
    size = sum(len(text.encode()) for text in texts)
    print(f"{arguments.out}: {tokenizer.kind}, {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.sha256[:12]}")
    print(f"trained on {len(texts):,} documents, {size / 1e6:.1f} MB; held-out documents were left out")
    return 0


def _open(arguments: argparse.Namespace):
    from bertgpt_jax.config import build
    from bertgpt_jax.corpus.config import CorpusConfig
    from bertgpt_jax.corpus.kinds import load_tokenizer, open_tokenizer
    from bertgpt_jax.corpus.tokenizer import CONFIG_FILE

    path = Path(arguments.tokenizer).expanduser()
    if (path / "tokenizer" / CONFIG_FILE).is_file():
        path = path / "tokenizer"
    if arguments.kind is None:
        if not (path / CONFIG_FILE).is_file():
            advice = "for published files give --kind"
            raise ConfigError(f"{path} is no saved tokenizer ({CONFIG_FILE} is missing); {advice}")
        return load_tokenizer(path)
    settings: dict[str, object] = {"kind": arguments.kind, "path": str(path)}
    if arguments.cased and arguments.kind == "wordpiece":
        settings |= {"lowercase": False, "strip_accents": False}
    return open_tokenizer(build(CorpusConfig, {"tokenizer": settings}, "--kind").tokenizer)


def _values(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.values:
        yield " ".join(arguments.values)
    else:
        yield from (line.rstrip("\n") for line in sys.stdin)


def _encode(arguments: argparse.Namespace) -> int:
    tokenizer = _open(arguments)
    for text in _values(arguments):
        ids, flags = tokenizer.encode_sentences([text])
        if arguments.pieces:
            print(" ".join(("|" if flag & 1 else "") + tokenizer.token(i) for i, flag in zip(ids, flags, strict=True)))
        else:
            print(" ".join(map(str, ids)))
    return 0


def _decode(arguments: argparse.Namespace) -> int:
    tokenizer = _open(arguments)
    for line in _values(arguments):
        try:
            ids = [int(word) for word in line.split()]
        except ValueError:
            raise UsageError(f"decode takes integers, got '{line[:60]}'") from None
        print(tokenizer.decode(ids))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from bertgpt_jax.corpus.builder import sample_texts
    from bertgpt_jax.corpus.config import CorpusConfig
    from bertgpt_jax.corpus.plan import find_request, make_plan

    tokenizer = _open(arguments)
    config = CorpusConfig(path=arguments.source)
    texts = sample_texts(make_plan(config, *find_request(config)), None, 100_000_000, arguments.sample)
    lost: Counter[str] = Counter()
    unknown = tokens = characters = words = exact = 0
    for text in texts:
        ids = tokenizer.encode(text)
        tokens += len(ids)
        characters += len(text)
        words += len(text.split())
        unknown += int((ids == tokenizer.special.unk).sum()) if tokenizer.special.unk is not None else 0
        exact += tokenizer.decode(ids) == text
        lost.update(tokenizer.lost_characters(text))
    print(f"{tokenizer.kind}, {tokenizer.vocab_size:,} pieces, on {len(texts):,} documents of {arguments.source}")
    rate, size = tokens / max(1, words), characters / max(1, tokens)
    print(f"tokens      {tokens:,}: {rate:.2f} a word, {size:.2f} characters each")
    print(f"unknown     {unknown:,} ({unknown / max(1, tokens):.3%} of the tokens)")
    print(f"round trip  {exact:,} of {len(texts):,} documents decode to themselves")
    for line in lost_lines(lost, characters):
        print(line)
    return 0


def lost_lines(lost: Counter[str], characters: int) -> list[str]:
    """The report on characters that normalisation removes, by Unicode category, with a warning for combining marks."""
    total = sum(lost.values())
    lines = [f"lost        {total:,} characters to normalisation ({total / max(1, characters):.3%})"]
    categories: dict[str, Counter[str]] = {}
    for character, count in lost.items():
        categories.setdefault(unicodedata.category(character), Counter())[character] = count
    for category, found in sorted(categories.items(), key=lambda item: -sum(item[1].values())):
        shown = ", ".join(f"U+{ord(c):04X} {unicodedata.name(c, '')} {n:,}" for c, n in found.most_common(3))
        lines.append(f"  {category}  {sum(found.values()):,}: {shown}")
    marks = sum(sum(found.values()) for category, found in categories.items() if category.startswith("M"))
    if marks:
        lines.append(
            f"warning: {marks:,} combining marks are lost: accents, and in many scripts vowel signs; "
            "train with tokenizer.strip_accents=false to keep them"
        )
    return lines
