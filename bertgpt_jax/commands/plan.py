"""`plan CONFIG --topology v5p:8x8x16`: whether a run fits and how fast it would be, on chips that need not be here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertgpt_jax.commands.common import check_outputs, command_parser, run_command, select_platform
from bertgpt_jax.errors import ConfigError, UsageError

_DESCRIPTION = """\
Compiles the real train step of every stage for the named place, without its hardware, and predicts the time of a step,
of the run, and its cost. Places: v5p:8x8x16, v5e:4x4, v6e:16x16, v4:8x8x8, cloud names (v5p-512, v5litepod-256, v4-32),
h200:8, cpu:8. Ends with 78 if it does not fit, saying what would."""


SHOWN = 10
"""Layouts of a search that are shown."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/plan.py` and `bertgpt plan`."""
    parser = command_parser("plan", _DESCRIPTION)
    parser.add_argument("config", nargs="?", help="a shipped name, or a .py or .json file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changed settings")
    parser.add_argument("--topology", metavar="PLACE", help="chip and shape, or a cloud's name")
    parser.add_argument("--slices", type=int, default=1, help="slices of that shape, joined by the network (default 1)")
    parser.add_argument("--mesh", metavar="AXIS=N,...", help="in place of the config's; the data axis takes the rest")
    parser.add_argument("--search", action="store_true", help="rank meshes, remat policies and microbatches")
    parser.add_argument("--compile-best", type=int, default=2, metavar="N", help="of a search (default 2)")
    parser.add_argument("--no-compile", action="store_true", help="by the analytic model alone, in seconds")
    parser.add_argument(
        "--weak-scaling", nargs="+", metavar="PLACE[*SLICES]", help="the same rows a chip there, on paper; no compiling"
    )
    parser.add_argument("--price", type=float, metavar="X", help="of a chip for an hour, to print the cost")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="print JSON, or write it to FILE")
    parser.add_argument("--png", metavar="FILE", help="draw bytes and times")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="Markdown of plans written with --json; no planning")
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
    check_outputs(*(Path(name) for name in (args.json, args.png) if name not in (None, "-")))
    if args.table:
        return _table(args)
    if args.weak_scaling:
        if args.search or args.mesh or args.topology or args.png or args.price is not None:
            raise UsageError("--weak-scaling names its own places, and goes with --json alone")
        if args.config:
            return _weak_scaling(args)
    if not args.config or not args.topology:
        raise UsageError("give CONFIG and --topology PLACE, e.g. gpt/gpt2 --topology v5e:4x4; see --help")
    place = places.parse(args.topology, args.slices)
    config = load_config(args.config, RunConfig, args.overrides)
    if not args.no_compile:
        check_compiler(place)
    ranked = []
    if args.search:
        if args.json != "-":
            print(f"ranking layouts for {place.describe()}, then compiling the best ...", flush=True)
        ranked, plans = search(config, place, args.compile_best, args.price)
        if args.json != "-":
            _print_ranking(ranked, place)
        plan: Plan = plans[0]
    else:
        prepared = prepare(config, place, parse_mesh(args.mesh) if args.mesh else None)
        if args.json != "-":
            print(f"compiling for {place.describe()} ..." if not args.no_compile else place.describe(), flush=True)
        plan = make_plan(prepared, compiling=not args.no_compile, price=args.price)
    _show(args, plan, ranked)
    if not plan.fits:
        raise ConfigError(advice(prepared, plan))
    return 0


def _weak_scaling(args: argparse.Namespace) -> int:
    from bertgpt_jax.config import load_config
    from bertgpt_jax.planning import places, scaling
    from bertgpt_jax.planning.published import calibration_error
    from bertgpt_jax.planning.report import error_text
    from bertgpt_jax.training.run_config import RunConfig

    found = []
    for text in args.weak_scaling:
        name, _, slices = text.partition("*")
        if slices and not slices.isdigit():
            raise UsageError(f"--weak-scaling '{text}' is not PLACE*SLICES, e.g. v5e:16x16*4")
        found.append(places.parse(name, int(slices or 1)))
    points = scaling.weak_scaling(load_config(args.config, RunConfig, args.overrides), found)
    tree = json.dumps({"calibration_error": calibration_error(), "points": scaling.as_json(points)})
    if args.json == "-":
        print(tree)
        return 0
    if args.json:
        Path(args.json).write_text(tree + "\n")
    print(scaling.markdown(f"{args.config}: {points[0].rows / found[0].chips:g} rows a chip", points))
    for name, known in scaling.published_scaling((1, 2, 4, 8, 16, 32)) if found[0].chip.name == "v5e" else ():
        print("\n" + scaling.markdown(f"{name} on slices of v5e-256, beside what MaxText published", known))
    print(f"\ntimes are {error_text(*found)}" + (f"; numbers in {args.json}" if args.json else ""))
    return 0


def _table(args: argparse.Namespace) -> int:
    from bertgpt_jax.planning import places, report

    trees: list[dict[str, Any]] = []
    for name in args.table:
        try:
            read = json.loads(Path(name).read_text())
            trees += read if isinstance(read, list) else [read]
        except ValueError:
            raise UsageError(f"--table '{name}' is no JSON; give what --json wrote") from None
    plans = [(f"{tree['config']} {' '.join(tree.get('overrides', []))}".strip(), tree) for tree in trees]
    print(report.markdown(plans))
    print(f"\ntimes are {report.error_text(*{places.parse(tree['topology']) for _, tree in plans})}")
    if args.png:
        report.draw(list(zip(_labels(trees), trees, strict=True)), Path(args.png))
    return 0


def _labels(trees: list[dict[str, Any]]) -> list[str]:
    """A name for each plan: its config and place, and its mesh where another plan has both too."""
    names = [f"{tree['config']}, {tree['chips']:,} {tree['topology']}" for tree in trees]
    meshes = [",".join(f"{axis}={size}" for axis, size in tree["mesh"].items() if size > 1) for tree in trees]
    return [f"{name}, {mesh}" if names.count(name) > 1 else name for name, mesh in zip(names, meshes, strict=True)]


def _print_ranking(ranked: list, place) -> None:
    from bertgpt_jax.planning.report import error_text

    print(f"{len(ranked)} layouts fit by the model; the fastest (times {error_text(place)}):")
    for candidate in ranked[:SHOWN]:
        print(f"  {candidate.seconds:8.4g} s {candidate.bytes_per_device / 2**30:7.2f} GiB  {candidate.describe()}")


def _show(args: argparse.Namespace, plan, ranked: Sequence) -> None:
    from bertgpt_jax.planning import report

    tree = {"config": args.config, "overrides": args.overrides} | report.as_json(plan)
    if ranked:
        best = ranked[:SHOWN]
        tree["ranking"] = [dataclasses.asdict(c) | {"shards": c.shards._asdict()} for c in best]
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
