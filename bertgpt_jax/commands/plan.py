"""`plan CONFIG --topology v5p:8x8x16`: whether a run fits and how fast it would be, on chips that need not be here."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from bertgpt_jax.commands.common import command_parser, run_command, select_platform
from bertgpt_jax.errors import ConfigError, UsageError

_DESCRIPTION = """\
Compiles the real train step of every stage for the named place, without its hardware, and predicts the time of a step,
of the run, and its cost. Places: v5p:8x8x16, v5e:4x4, v6e:16x16, v4:8x8x8, cloud names (v5p-512, v5litepod-256, v4-32),
h200:8, cpu:8. Ends with 78 if it does not fit, saying what would."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/plan.py` and `bertgpt plan`."""
    parser = command_parser("plan", _DESCRIPTION)
    parser.add_argument("config", help="a shipped name, or a .py or .json file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changed settings")
    parser.add_argument("--topology", required=True, metavar="PLACE", help="chip and shape, or a cloud's name")
    parser.add_argument("--slices", type=int, default=1, help="slices of that shape, joined by the network (default 1)")
    parser.add_argument("--mesh", metavar="AXIS=N,...", help="in place of the config's; the data axis takes the rest")
    parser.add_argument("--search", action="store_true", help="rank meshes, remat policies and microbatches")
    parser.add_argument("--compile-best", type=int, default=2, metavar="N", help="of a search (default 2)")
    parser.add_argument("--no-compile", action="store_true", help="by the analytic model alone, in seconds")
    parser.add_argument("--price", type=float, metavar="X", help="of a chip for an hour, to print the cost")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="print JSON, or write it to FILE")
    parser.add_argument("--png", metavar="FILE", help="draw bytes and times")
    return run_command(_plan, parser, argv)


def _plan(args: argparse.Namespace) -> int:
    select_platform("cpu")
    from bertgpt_jax.config import load_config
    from bertgpt_jax.planning import places
    from bertgpt_jax.planning.compiled import check_compiler
    from bertgpt_jax.planning.plan import Plan, make_plan, parse_mesh, prepare
    from bertgpt_jax.planning.search import advice, search
    from bertgpt_jax.training.run_config import RunConfig

    logging.getLogger("bertgpt_jax").setLevel(logging.WARNING)
    if args.slices < 1 or args.compile_best < 1 or (args.price is not None and args.price < 0):
        raise UsageError(f"--slices {args.slices}, --compile-best {args.compile_best}, --price {args.price}: too small")
    if args.search and (args.mesh or args.no_compile):
        raise UsageError("--search chooses the mesh and compiles; leave --mesh and --no-compile out")
    if args.png and Path(args.png).suffix != ".png":
        raise UsageError(f"--png '{args.png}' must end in .png")
    place = places.parse(args.topology, args.slices)
    config = load_config(args.config, RunConfig, args.overrides)
    if not args.no_compile:
        check_compiler(place)
    if args.search:
        ranked, plans = search(config, place, args.compile_best, args.price)
        if args.json != "-":
            _print_ranking(ranked)
        if not plans:
            raise ConfigError("none of the best candidates fits as compiled; raise --compile-best or take more chips")
        plan: Plan = plans[0]
    else:
        prepared = prepare(config, place, parse_mesh(args.mesh) if args.mesh else None)
        if args.json != "-":
            print(f"compiling for {place.describe()} ..." if not args.no_compile else place.describe(), flush=True)
        plan = make_plan(prepared, compiling=not args.no_compile, price=args.price)
    _show(args, plan)
    if not plan.fits:
        raise ConfigError(advice(prepared, plan))
    return 0


def _print_ranking(ranked: list, most: int = 10) -> None:
    print(f"{len(ranked)} layouts fit by the model; the fastest:")
    for candidate in ranked[:most]:
        print(f"  {candidate.seconds:8.4g} s {candidate.bytes_per_device / 2**30:7.2f} GiB  {candidate.describe()}")


def _show(args: argparse.Namespace, plan) -> None:
    from bertgpt_jax.planning import report

    tree = report.as_json(plan) | {"config": args.config}
    if args.json == "-":
        print(json.dumps(tree))
    else:
        print(report.text(plan))
    if args.json not in (None, "-"):
        Path(args.json).write_text(json.dumps(tree, indent=1) + "\n")
        print(f"numbers in {args.json}")
    if args.png:
        report.draw([(f"{args.config} on {plan.place.name}", tree)], Path(args.png))
        if args.json != "-":
            print(f"picture in {args.png}")
