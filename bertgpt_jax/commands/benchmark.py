"""`benchmark NAME [key=value ...]`: measures a speed beside its peers, on a machine that does nothing else."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertgpt_jax.commands.common import (
    add_platform,
    check_outputs,
    check_platform,
    command_parser,
    run_command,
    select_platform,
)
from bertgpt_jax.errors import DataError, MachineBusy, UsageError, UserError
from bertgpt_jax.training.heap import keep_freed_memory

UNTIMED = frozenset({"convergence", "hlo", "memory_ladder"})
"""Benchmarks that measure no time, and no accelerator either: others may use the machine."""

BENCHMARKS = {
    "data": "batches a second: masks, windows, pairs, packing, beside Hugging Face collators and Grain per record",
    "cpu_bert": "a BERT training step on CPU cores beside transformers, eager and torch.compile",
    "cpu_gpt": "a GPT training step on CPU cores beside transformers, eager and torch.compile",
    "decode": "tokens a second of a GPT-2 small on CPU cores beside transformers.generate, prefill and decoding apart",
    "checkpoint": "what a save takes from training, and how it compares with a plain write of as many bytes",
    "startup": "from the start of a process to its first step done: scanned and unrolled, cold and warm cache",
    "time_to_loss": "seconds to a held-out loss on Shakespeare's characters beside a nanoGPT, eager and compiled",
    "convergence": "held-out losses with each technique beside plain training, GPT and BERT, on three seeds",
    "flops": "arithmetic of compiled steps over the formula that the utilisation is computed with",
    "gpu": "all of one GPU in under ten minutes: the four below, one after another",
    "gpu_checks": "kernels of this device, their gradients too, beside plain arithmetic: it fails where they differ",
    "gpu_step": "training steps of published sizes on one GPU beside torch.compile: rates, utilisation, memory, starts",
    "gpu_ablation": "what each technique gives a training step on one GPU, beside what was predicted",
    "ceilings": "what the devices do at best: matrix products, copies, sums over all of them",
    "hlo": "what must hold of steps compiled for TPUs that are not here (needs the extra libtpu)",
    "memory_ladder": "memory of steps compiled for TPUs that are not here, technique by technique (extra libtpu)",
}
"""Name to its line of help; the code of `name` is `bertgpt_jax/benchmarks/name.py`: `Settings`, `run(settings)`."""

ON_CPU = frozenset({"data", "cpu_bert", "cpu_gpt", "decode", "checkpoint", "startup", "time_to_loss", "flops"})
"""Benchmarks that leave accelerators alone."""

ON_GPU = frozenset({"gpu", "gpu_checks", "gpu_step", "gpu_ablation", "ceilings"})
"""Benchmarks of accelerators: they use all CPUs, and share the accelerator's memory with peers."""

_DESCRIPTION = """\
Measures a speed. Ours and its peers take turns in one process; medians, their spread, versions and hardware are written
down. A machine on which others compute is refused, because sides slow down by different factors there."""

_EPILOG = "benchmarks:\n" + "\n".join(f"  {name:14} {text}" for name, text in BENCHMARKS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/benchmark.py` and `bertgpt benchmark`."""
    parser = command_parser("benchmark", _DESCRIPTION, _EPILOG)
    parser.add_argument("name", nargs="?", metavar="NAME", help="which benchmark")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the benchmark")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything that was measured there")
    parser.add_argument("--allow-loaded", action="store_true", help="measure on a busy machine too, and say so")
    parser.add_argument("--cpus", type=int, help="CPUs to use (0: all of them; default 2, and all beside accelerators)")
    parser.add_argument(
        "--keep-freed-memory",
        action="store_true",
        help="malloc keeps it in this process, for all sides, as in training runs on CPUs (default: as usual)",
    )
    parser.add_argument("--print-settings", action="store_true", help="show the benchmark's settings and stop")
    parser.add_argument("--table", nargs="*", type=Path, metavar="FILE", help="Markdown rows of results; no measuring")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="with --table: write them there, between markers")
    add_platform(parser)
    return run_command(_benchmark, parser, argv)


def _benchmark(args: argparse.Namespace) -> int:
    from bertgpt_jax.benchmarks import harness, record
    from bertgpt_jax.config import apply_overrides, to_json

    if args.table is not None:
        return _show_results(args.table, args.readme)
    if args.readme:
        raise UsageError("--readme goes with --table, which writes the results of docs/results into it")
    if args.name not in BENCHMARKS:
        raise UsageError(f"benchmark '{args.name or ''}' is unknown; known: {', '.join(BENCHMARKS)}")
    check_outputs(args.json)
    on_gpu = args.name in ON_GPU
    harness.use_cpus((0 if on_gpu else 2) if args.cpus is None else args.cpus)
    select_platform("cpu" if args.name in ON_CPU | UNTIMED else args.platform)
    if on_gpu:
        share_gpu()
    elif args.keep_freed_memory:
        keep_freed_memory()
    module = importlib.import_module(f"bertgpt_jax.benchmarks.{args.name}")
    settings = apply_overrides(module.Settings(), args.settings)
    if args.print_settings:
        print(to_json(settings), end="")
        return 0
    if on_gpu:
        check_platform(args.platform)
    timed = args.name not in UNTIMED
    around = harness.look_around() if timed else harness.Watch()
    if around.loaded and not args.allow_loaded:
        raise MachineBusy(
            f"others use {around.others + around.stolen:.0%} of this machine's CPU time, over the "
            f"{harness.BUSY_SHARE:.0%} at which times still mean something; wait, or pass --allow-loaded"
        )
    begun = time.perf_counter()
    with harness.Watch() as watch:
        result = module.run(settings)
    malloc = "kept" if args.keep_freed_memory and not on_gpu else "system"
    found = record.document(args.name, settings.model_dump(mode="json"), result, watch if timed else around, malloc)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    _report(found, args, time.perf_counter() - begun)
    if result.failures:
        raise UserError(f"benchmark {args.name} found failures: {'; '.join(result.failures)}")
    return 0


def _show_results(files: Sequence[Path], readme: Path | None) -> int:
    from bertgpt_jax.benchmarks import record

    found = read_results(files)
    if readme is None:
        print(record.table(found))
    else:
        record.into_readme(readme, found)
    return 0


def share_gpu() -> None:
    """Lets jax take a GPU's memory as it needs it, up to nearly all of it; before jax starts. What is set stays."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def _report(found: dict[str, Any], args: argparse.Namespace, seconds: float) -> None:
    from bertgpt_jax.benchmarks.harness import Row
    from bertgpt_jax.benchmarks.record import bar, shown

    for row in (Row(**tree) for tree in found["rows"]):
        line = f"  {row.measure:72} {shown(row.value, row.unit):>16}   {bar(row).replace('missed', 'MISSED')}"
        print(line.rstrip())
    if found["load"]["drifting"]:
        print(f"warning: times moved while measuring: {', '.join(found['load']['drifting'])}", file=sys.stderr)
    if found["loaded"]:
        others = found["load"]["others"] + found["load"]["stolen"]
        print(f"warning: DISTURBED: others took {others:.0%} of the machine; do not publish this", file=sys.stderr)
    where = f": {args.json}" if args.json else "; --json FILE keeps every number"
    print(f"{found['benchmark']} took {seconds:.0f} s{where}")


def read_results(paths: Sequence[Path], folder: Path = Path("docs/results")) -> list[dict[str, Any]]:
    """The records in `paths`, in the order of `BENCHMARKS`; without any, those in `folder`.

    Raises:
        DataError: a file given by name is no record; none is found.
    """
    files = list(paths) or sorted(folder.glob("*.json"))
    found = []
    for path in files:
        try:
            tree = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); measure again") from None
        if isinstance(tree, dict) and "benchmark" in tree:
            found.append(tree)
        elif paths:
            raise DataError(f"{path}: no result of a benchmark; write one with tools/benchmark.py NAME --json {path}")
    if not found:
        raise DataError(f"no results of benchmarks in {folder}; run from a checkout, or name the files")
    names = list(BENCHMARKS)
    return sorted(found, key=lambda tree: names.index(tree["benchmark"]) if tree["benchmark"] in names else len(names))
