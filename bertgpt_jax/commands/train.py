"""Pretrains a model from a config; the same command again goes on where the run stopped."""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bertgpt_jax.commands.common import add_platform, check_platform, command_parser, run_command, select_platform
from bertgpt_jax.errors import UsageError

if TYPE_CHECKING:
    from bertgpt_jax.training.run_config import RunConfig
    from bertgpt_jax.transfer.initial import Initial

EPILOG = """\
examples:
  %(prog)s configs/quickstart.py
  %(prog)s configs/gpt/shakespeare_char.py corpus.path=input.txt --workdir runs/shakespeare
  %(prog)s configs/bert/base.py corpus.path='wiki/*.gz' execution.mesh.fsdp=8 stages.phase1.batch_size=512

exit codes:
  0 finished   64 usage   65 bad data   74 storage   75 stopped on request, saved: start again
  76 another process failed   77 the loss is not finite   78 bad config
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/train.py` and `bertgpt train`."""
    parser = command_parser("train", __doc__, EPILOG)
    parser.add_argument("config", help="a config file (.py or .json), or the name of a shipped one (bert/base)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to the config")
    parser.add_argument("--workdir", help="where everything of the run is written (default: runs/NAME)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as JSON and stop")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, FLOPs, memory and shardings and stop")
    parser.add_argument(
        "--allow-change", default="", metavar="KEYS", help="identity settings that may differ on resume"
    )
    parser.add_argument("--from-step", type=int, metavar="N", help="go on from checkpoint N; newer ones are set aside")
    add_platform(parser)
    gc.disable()  # imports and tracing make much that lasts and hardly a cycle; the run turns it on again
    try:
        return run_command(_train, parser, argv)
    finally:
        gc.enable()


def _train(args: argparse.Namespace) -> int:
    for item in args.overrides:
        if "=" not in item:
            raise UsageError(f"'{item}' is not key=value; a run takes one config")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA tells of its compilation cache at every start
    select_platform(args.platform)
    from bertgpt_jax.config import load_config, to_json
    from bertgpt_jax.parallel.distributed import from_environment
    from bertgpt_jax.training.run_config import RunConfig

    config = load_config(args.config, RunConfig, args.overrides)
    if args.print_config:
        print(to_json(config), end="")
        return 0
    several = from_environment(config.execution.distributed).is_set  # then no device may be touched before they meet
    if not several:
        check_platform(args.platform)
    if args.dry_run:
        from bertgpt_jax.training.dry_run import describe

        print(describe(config))
        return 0
    from bertgpt_jax.training.run import train

    workdir = args.workdir or str(Path("runs") / _name(args.config))
    allowed = tuple(name for name in args.allow_change.split(",") if name)
    initial = None
    if config.init_from:
        from bertgpt_jax.transfer.initial import resolve

        config, initial = resolve(config, workdir)
    check = partial(check_platform, args.platform) if several else None
    train(config, workdir, allowed, from_step=args.from_step, debug=args.debug, initial=initial, check_devices=check)
    _afterwards(config, workdir, initial)
    return 0


def _afterwards(config: RunConfig, workdir: str, initial: Initial | None) -> None:
    """What a finished run adds to its workdir: a comparison with what it began from, a directory for others."""
    import jax

    if jax.process_count() > 1:  # one process is enough for both, and the others are gone by then
        return
    if initial is not None:
        from bertgpt_jax.evaluation.before_after import compare

        for line in compare(workdir, initial):
            print(line)
    if config.execution.export.at_end:
        from bertgpt_jax.training.storage import workdir_path
        from bertgpt_jax.transfer.export import export_hf
        from bertgpt_jax.transfer.load import open_source
        from bertgpt_jax.transfer.trained_on import corpus_totals

        out = Path(workdir).expanduser() / "export" / "final"
        if out.exists():
            print(f"'{out}' is there already; delete it to export again")
            return
        source = open_source(workdir)
        data = corpus_totals(workdir_path(workdir), source.meta)
        export_hf(source, str(out), config.execution.export.dtype, data=data)
        print(f"exported the best checkpoint to {out}: transformers' from_pretrained reads it")


def _name(config: str) -> str:
    """`bert-base` for `configs/bert/base.py` or `bert/base`."""
    parts = Path(config).with_suffix("").parts
    return "-".join(parts[parts.index("configs") + 1 :] if "configs" in parts else parts[-2:])
