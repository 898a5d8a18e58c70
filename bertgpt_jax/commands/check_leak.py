"""Perturbs single documents of a config's batches and checks that nothing of them reaches any other."""

from __future__ import annotations

import argparse
import os
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertgpt_jax.commands.common import add_platform, check_platform, command_parser, run_command, select_platform
from bertgpt_jax.errors import ConfigError, UsageError

EPILOG = """\
A segment is a document or a sentence pair of a packed row; where rows are not packed, a row. Its tokens are exchanged,
and the hidden states, losses and gradients of all others must stay the same bit for bit, with every attention path.
Splash, the path of TPUs, is emulated elsewhere; it takes lengths of a multiple of 128 and heads of 64, 128 or 256.

examples:
  %(prog)s configs/bert/base_packed.py corpus.path=wiki.corpus model.num_layers=2
  %(prog)s configs/quickstart.py objective.examples.kind=packed_pairs

exit codes:
  0 nothing leaks (or documents of a row see each other by design, which is said)   1 a leak   78 bad config
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/check_leak.py` and `bertgpt check_leak`."""
    parser = command_parser("check_leak", __doc__, EPILOG)
    parser.add_argument("config", help="a config file (.py or .json), or the name of a shipped one (bert/base)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to the config")
    parser.add_argument("--stage", help="whose sequence length to use (default: the first)")
    parser.add_argument("--rows", type=int, default=2, help="rows of the batch, the fullest ones (default: 2)")
    parser.add_argument("--trials", type=int, default=3, help="segments to perturb, one by one (default: 3)")
    parser.add_argument("--corpora", help="where text is prepared if it is no prepared corpus (default: thrown away)")
    add_platform(parser)
    return run_command(_check_leak, parser, argv)


def _check_leak(args: argparse.Namespace) -> int:
    for item in args.overrides:
        if "=" not in item:
            raise UsageError(f"'{item}' is not key=value; one config is checked")
    for name, least in (("rows", 2), ("trials", 1)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least {least}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    select_platform(args.platform)
    from bertgpt_jax.config import load_config
    from bertgpt_jax.training.run_config import RunConfig

    config = load_config(args.config, RunConfig, args.overrides)
    check_platform(args.platform)
    with tempfile.TemporaryDirectory() as thrown_away:
        return _check_paths(config, args, Path(args.corpora or thrown_away))


def _check_paths(config: Any, args: argparse.Namespace, corpora: Path) -> int:
    """A line for each attention path; returns the exit code."""
    import jax

    from bertgpt_jax.corpus.mixture import open_any
    from bertgpt_jax.evaluation import leaks
    from bertgpt_jax.models import make_model
    from bertgpt_jax.parallel.sharding import unboxed
    from bertgpt_jax.training.data import make_train
    from bertgpt_jax.training.run_config import with_vocabulary

    names = [stage.name for stage in config.stages]
    if args.stage not in (None, *names):
        raise ConfigError(f"no stage '{args.stage}'; the config has {names}")
    index = names.index(args.stage) if args.stage else 0
    corpus = open_any(config.corpus, corpora)
    config = with_vocabulary(config, corpus.vocab_size)
    objective = config.objective
    data = make_train(config, index, 0, corpus, corpora)
    batch = leaks.rows_to_check(data.batch, objective.examples, args.rows)
    regular, params, exit_code = ~corpus.special_mask(), None, 0
    for path in attention_paths():
        # Products of 8-bit operands have one scale for all rows, which any token can change.
        changed = {"attention": path, "emulate": True, "matmul": "same"}
        compute = type(config.execution.compute)(**config.execution.compute.model_dump() | changed)
        model = make_model(config.model, compute)
        emulated = " (emulated)" if path == "splash" and compute.compiled_for() != "tpu" else ""
        title = f"{objective.kind}, {objective.examples.kind}, {path}{emulated}"
        try:
            if params is None:
                init = jax.jit(lambda model=model: model.init(jax.random.key(0), *objective.model_inputs(batch)))
                params = unboxed(init()["params"])
            found = leaks.find_leaks(
                leaks.observer(model, objective), params, batch, objective.examples, regular, args.trials
            )
        except ConfigError as error:
            print(f"{title}: not checked, this path cannot serve here ({error})")
            continue
        print(f"{title}: {verdict(found, batch, objective.examples)}")
        exit_code = 1 if any(found) else exit_code
    if leaks.crosses_documents(objective.examples):
        print(
            f"{objective.examples.kind} leaks by design: the documents of one row see each other (only whole rows "
            "were checked against each other); packed_documents keeps them apart"
        )
    return exit_code


def attention_paths() -> tuple[str, ...]:
    """The attention paths that a config can name, but for the automatic choice among them."""
    from bertgpt_jax.nn.blocks import ComputeConfig

    return tuple(p for p in typing.get_args(ComputeConfig.model_fields["attention"].annotation) if p != "auto")


def verdict(found: list, batch: dict, examples: Any) -> str:
    """One line: what was perturbed and what, if anything, it reached."""
    from bertgpt_jax.evaluation.leaks import packed, segment_ids

    ids = segment_ids(batch, examples)
    unit = "segments" if packed(examples) else "rows"
    total = sum(len(set(row[row > 0].tolist())) for row in ids)
    leaking = [leak for leak in found if leak]
    if not leaking:
        return (
            f"no leak; {len(found)} of {total} {unit} perturbed one by one, hidden states, losses and gradients of all "
            "others bit-identical"
        )
    first = leaking[0]
    effects = [f"hidden states of {_listed(first.outputs)}"] * bool(first.outputs)
    effects += [f"gradients of {_listed(first.gradients)}"] * bool(first.gradients)
    effects += ["losses of the others changed"] * first.losses
    effects += ["it gets gradient from the others' losses"] * first.reached
    return f"LEAK in {len(leaking)} of {len(found)} trials; perturbing {_name(first.perturbed)}: {'; '.join(effects)}"


def _listed(segments: tuple) -> str:
    more = f" and {len(segments) - 3} more" if len(segments) > 3 else ""
    return ", ".join(map(_name, segments[:3])) + more + " changed"


def _name(segment: tuple[int, int]) -> str:
    return f"row {segment[0]} segment {segment[1]}" if segment[1] else f"row {segment[0]} padding"
