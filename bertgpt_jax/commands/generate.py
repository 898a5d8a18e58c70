"""Continues text with a GPT: samples, the most probable tokens one by one, or beam search."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bertgpt_jax.commands.common import add_platform, check_platform, command_parser, run_command, select_platform
from bertgpt_jax.errors import ConfigError, DataError, StorageError, UsageError
from bertgpt_jax.training.heap import keep_freed_memory

if TYPE_CHECKING:
    from bertgpt_jax.generation.continuation import Continuation

EPILOG = """\
examples:
  %(prog)s runs/shakespeare --prompt "ROMEO:" --temperature 0.8 --top-k 200
  %(prog)s gpt2 --prompt "Alan Turing" --temperature 0 --max-new 50
  %(prog)s gpt2 --prompt "Q: 2+2? A:" --beams 4 --alpha 0.6 --stop "Q:"
  %(prog)s runs/gpt2 --file prompts.txt --samples 4 --json > continuations.jsonl

The text goes to stdout, all else to stderr. A row ends with the end-of-document token, a stop string or --max-new
tokens. The same seed gives prompt i of a file the same text, whatever the batch. A prompt that does not fit in the
context with its continuation is refused; --slide reads the last half of the context again whenever it is full.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/generate.py` and `bertgpt generate`."""
    parser = command_parser("generate", __doc__, EPILOG)
    parser.add_argument("model", metavar="WORKDIR", help="the workdir of a run, or a Hugging Face directory")
    parser.add_argument("--which", default="best", help="best, latest or a step of a run (default: best)")
    what = parser.add_argument_group("what to continue").add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", metavar="TEXT", help="a text; may be given several times")
    what.add_argument("--file", metavar="FILE", help="a prompt a line, blank lines left out; - is stdin")
    what.add_argument("--unconditional", action="store_true", help="begin where documents begin")
    what.add_argument("--ids", action="append", metavar="'1 2 3'", help="token ids; for models without a tokenizer too")
    parser.add_argument("--allow-unknown", action="store_true", help="let [UNK] stand for what the vocabulary lacks")
    parser.add_argument("--max-new", type=int, metavar="N", help="most new tokens (default: 128, or what fits)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="continuations of each prompt (default: 1)")
    how = parser.add_argument_group("how")
    how.add_argument("--temperature", type=float, help="0 takes the most probable token (default: 1)")
    how.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    how.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens with probability P together")
    how.add_argument("--min-p", type=float, metavar="P", help="leave out tokens below P times the best's probability")
    how.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: tokens seen become less likely")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--beams", type=int, metavar="K", help="beam search; prints the best, --samples the n best")
    how.add_argument("--alpha", type=float, help="length penalty of beam search (default: 0.6; 0 for none)")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    how.add_argument("--ignore-end", action="store_true", help="go on after the end-of-document token")
    how.add_argument("--slide", action="store_true", help="let the context slide when it is full")
    parser.add_argument("--batch-size", type=int, default=16, help="rows computed at once (default: 16)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--mesh", metavar="AXIS=N,...", help="spread over devices, as in training (default: use one)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a continuation")
    add_platform(parser)
    return run_command(_generate, parser, argv)


def _generate(args: argparse.Namespace) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    select_platform(args.platform)
    if check_platform(args.platform) == "cpu":
        keep_freed_memory()
    _check(args)
    from bertgpt_jax.generation.decode import GptDecoder
    from bertgpt_jax.transfer.load import open_source
    from bertgpt_jax.transfer.source import nested

    sampling, mesh = _sampling(args), _mesh(args.mesh)
    source = open_source(args.model, args.which)
    if source.model_config.kind != "gpt":
        raise ConfigError(f"{source.label} is a {source.model_config.kind}, no generator; see tools/fill_mask.py")
    texts, prompts = _prompts(args, source)
    tokenizer = source.tokenizer
    vocabulary = source.model_config.vocab_size if tokenizer is None else tokenizer.vocab_size
    decoder = GptDecoder(source.model_config, vocabulary, args.dtype)
    max_new = _max_new(args, prompts, decoder.max_positions)
    end = () if tokenizer is None or args.ignore_end or tokenizer.special.eot is None else (tokenizer.special.eot,)
    decode = _spell_ids if tokenizer is None else tokenizer.decode
    params = decoder.layout(nested(source.read(list(source.leaves))), mesh)
    task = Task(args, texts, prompts, decoder, params, sampling, max_new, end, decode, mesh)
    print(f"{source.label}: {len(prompts)} prompt{'s' if len(prompts) > 1 else ''}", file=sys.stderr)
    begun, tokens = time.perf_counter(), 0
    if len(prompts) * args.samples == 1 and args.beams is None and not args.json:
        tokens = _show_alone(task)
    else:
        for row in _sample(task) if args.beams is None else _search(task):
            tokens += row["tokens"]
            _print_row(row, texts, args.json)
    print(f"finished: {tokens:,} new tokens in {time.perf_counter() - begun:.1f} s", file=sys.stderr)
    return 0


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be continued, with what, and how.

    Attributes:
        texts, prompts: of each prompt, as given and as ids.
        end: ids that end a row.
        decode: ids -> text.
    """

    args: argparse.Namespace
    texts: Sequence[str]
    prompts: Sequence[Sequence[int]]
    decoder: Any
    params: Any
    sampling: Any
    max_new: int
    end: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]
    mesh: Any


def _spell_ids(ids: Sequence[int]) -> str:
    return "".join(f" {i}" for i in ids)


# ---------------------------------------------------------------- arguments


def _check(args: argparse.Namespace) -> None:
    for name in ("max_new", "samples", "batch_size", "beams"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed {args.seed}: must be between 0 and 2^32 - 1")
    if "" in args.stop:
        raise UsageError("--stop '': every text contains it; give a text that is not empty")
    if args.beams is None:
        if args.alpha is not None:
            raise UsageError(f"--alpha {args.alpha}: is of beam search; add --beams")
        return
    if args.alpha is not None and not 0 <= args.alpha <= 10:
        raise UsageError(f"--alpha {args.alpha}: must be between 0 and 10")
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "mesh"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is not for beam search; leave out one of the two")
    if args.slide:
        raise UsageError("--slide: beam search keeps its hypotheses in one context; leave out one of the two")
    if args.samples > args.beams:
        raise UsageError(f"--samples {args.samples}: {args.beams} beams have no more than {args.beams} results")


def _sampling(args: argparse.Namespace) -> Any:
    from bertgpt_jax.config import build
    from bertgpt_jax.generation.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return build(Sampling, given, "options")


def _mesh(text: str | None) -> Any:
    if text is None:
        return None
    from bertgpt_jax.config import apply_overrides
    from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh

    return make_mesh(apply_overrides(MeshConfig(), text.split(",")))


def _prompts(args: argparse.Namespace, source: Any) -> tuple[list[str], list[list[int]]]:
    """(what the user gave, its ids) of every prompt."""
    from bertgpt_jax.generation.prompts import document_start, encode_prompts, parse_ids

    if args.ids is not None:
        return args.ids, [parse_ids(text, source.model_config.vocab_size) for text in args.ids]
    if source.tokenizer is None:
        raise DataError(f"{source.label} has no tokenizer; give token ids with --ids")
    if args.unconditional:
        return [""], [document_start(source.tokenizer)]
    texts = args.prompt if args.file is None else _read_lines(args.file)
    return texts, encode_prompts(source.tokenizer, texts, args.allow_unknown)


def _read_lines(path: str) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if path == "-" else open(path, "rb").read()
        lines = [line for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"--file {path}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise StorageError(f"--file {path}: cannot be read ({error.strerror})") from None
    if not lines:
        raise UsageError(f"--file {path}: no prompt in it; write one a line")
    return lines


def _max_new(args: argparse.Namespace, prompts: Sequence[Sequence[int]], context: int) -> int:
    """How many tokens to draw; all prompts of a file are checked before the first is computed."""
    from bertgpt_jax.generation.continuation import check_lengths

    fits = context + 1 - max(map(len, prompts))
    wanted = args.max_new or (128 if args.slide else max(min(128, fits), 1))
    if not args.slide:
        check_lengths(prompts, wanted, context)
    return wanted


# ---------------------------------------------------------------- texts


def _continuation(task: Task, **settings: int) -> Continuation:
    from bertgpt_jax.generation.continuation import Continuation

    args = task.args
    return Continuation(
        task.decoder, task.params, task.sampling, task.max_new, stop_ids=task.end, slide=args.slide, seed=args.seed,
        mesh=task.mesh, **settings,
    )  # fmt: skip


def _show_alone(task: Task) -> int:
    """Writes the one continuation as it comes; returns its number of tokens."""
    from bertgpt_jax.generation.stream import TextStream

    stream = TextStream(task.decode, task.prompts[0], task.args.stop)

    def show(_: int, tokens: list[int]) -> bool:
        print(stream.feed(tokens), end="", flush=True)
        return stream.stop is not None

    print(task.texts[0], end="", flush=True)
    new = _continuation(task, tokens_a_call=1).run(task.prompts, watch=show)
    print(stream.finish(), flush=True)
    return len(new[0])


def _sample(task: Task) -> Iterator[dict[str, Any]]:
    """Every prompt's samples, a batch at a time."""
    from bertgpt_jax.generation.stream import TextStream

    continuation, size = _continuation(task), task.args.batch_size
    rows = [(i, sample) for i in range(len(task.prompts)) for sample in range(task.args.samples)]
    for begin in range(0, len(rows), size):
        batch = rows[begin : begin + size]
        streams = [TextStream(task.decode, task.prompts[i], task.args.stop) for i, _ in batch]

        def watch(row: int, tokens: list[int], streams: list[TextStream] = streams) -> bool:
            streams[row].feed(tokens)
            return streams[row].stop is not None

        new = continuation.run([task.prompts[i] for i, _ in batch], batch, watch)
        for (i, sample), stream, tokens in zip(batch, streams, new, strict=True):
            yield {"prompt": i, "sample": sample, "text": stream.text, "tokens": len(tokens), "stop": stream.stop}


def _search(task: Task) -> Iterator[dict[str, Any]]:
    """The best continuations of every prompt by beam search."""
    from bertgpt_jax.generation.beam import search
    from bertgpt_jax.generation.stream import TextStream

    args, alpha = task.args, 0.6 if task.args.alpha is None else task.args.alpha
    for begin in range(0, len(task.prompts), args.batch_size):
        batch = task.prompts[begin : begin + args.batch_size]
        found = search(task.decoder, task.params, batch, args.beams, task.max_new, alpha, task.end)
        for i, beams in enumerate(found, start=begin):
            for sample, (tokens, score) in enumerate(beams[: args.samples]):
                stream = TextStream(task.decode, task.prompts[i], args.stop)
                stream.feed([token for token in tokens if token not in task.end])
                row = {"prompt": i, "sample": sample, "text": stream.text, "tokens": len(tokens), "stop": stream.stop}
                yield row | {"score": round(score, 6)}


def _print_row(row: dict[str, Any], texts: Sequence[str], as_json: bool) -> None:
    """A continuation of prompt number `row["prompt"]`."""
    text = texts[row["prompt"]]
    if as_json:
        print(json.dumps(row | {"prompt": text}, ensure_ascii=False), flush=True)
        return
    score = f", score {row['score']:.4f}" if "score" in row else ""
    print(f"--- prompt {row['prompt'] + 1}, sample {row['sample'] + 1}{score}")
    print(text + row["text"], flush=True)
