"""Shards tokenised under Apache Beam, on other machines or in processes of this one.

The unit of work is the same as in the process pool: a worker reads the plan and the tokenizer from the corpus itself
and writes one shard to it. Beam lives in an environment of its own (`requirements-beam.txt`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bertgpt_jax import errors
from bertgpt_jax.corpus.kinds import load_tokenizer
from bertgpt_jax.corpus.places import BucketPath, Place, find_place
from bertgpt_jax.corpus.plan import PLAN_FILE, plan_from_json
from bertgpt_jax.corpus.remote import is_remote
from bertgpt_jax.corpus.shards import tokenise_shard
from bertgpt_jax.corpus.store import read_done, shard_name
from bertgpt_jax.errors import ConfigError, PeerError, UserError

RUNNERS = {
    "direct": (
        "apache_beam.runners.portability.fn_api_runner.FnApiRunner",
        ("--direct_running_mode=multi_processing", "--default_sdk_harness_log_level=WARNING"),
    ),
    "dataflow": ("DataflowRunner", ()),
    "spark": ("SparkRunner", ()),
    "flink": ("FlinkRunner", ()),
}
"""Our name to Beam's runner, and options it is given unless they are passed."""

_OURS = re.compile(r"bertgpt_jax\.errors\.(\w+): ([^\n]*?)(?: \[while running [^\n]*)?$", re.MULTILINE)


def require_beam(runner: str) -> None:
    """ConfigError unless Apache Beam is installed."""
    try:
        import apache_beam  # noqa: F401
    except ImportError:
        remedy = "in an environment of its own, run: pip install -r requirements-beam.txt && pip install --no-deps ."
        raise ConfigError(f"--runner {runner} needs apache_beam, which is not installed; {remedy}") from None


def tokenise_shards(out: Place, shards: list[int], runner: str, options: Sequence[str], workers: int) -> None:
    """Tokenises shards of the planned corpus `out`.

    Args:
        runner: a key of `RUNNERS`.
        options: Beam's own, such as `--project=...`.
        workers: processes of the direct runner; -1 is one a core.

    Raises:
        ConfigError: other machines could not see the corpus or its sources.
        UserError: of the kind that a worker raised. PeerError: a worker failed; the shards that are finished stay.
    """
    _check_visible(out, runner)
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions

    name, defaults = RUNNERS[runner]
    if runner == "direct":
        defaults = (*defaults, f"--direct_num_workers={max(workers, 0)}")
    target = str(out if isinstance(out, BucketPath) else out.absolute())
    pipeline = apache_beam.Pipeline(options=PipelineOptions([f"--runner={name}", *defaults, *options]))
    work = pipeline | apache_beam.Create(shards) | apache_beam.Reshuffle()
    _ = work | apache_beam.Map(tokenise_one, target)
    try:
        pipeline.run().wait_until_finish()
    except Exception as error:  # runners put what their workers raised into the text of errors of their own
        raise _plain(error, runner) from error


def tokenise_one(index: int, target: str) -> None:
    """Writes one shard, unless it is there; this is what runs on a worker."""
    out = find_place(target)
    plan = plan_from_json(out / PLAN_FILE)
    row = read_done(out / shard_name(index, len(plan.shards)))
    if row is None or row.get("request") != plan.request:
        tokenise_shard(plan, index, load_tokenizer(out / "tokenizer"), out)


def _check_visible(out: Place, runner: str) -> None:
    """Machines of Google's see no files of this one."""
    if runner != "dataflow":
        return
    sources = plan_from_json(out / PLAN_FILE).files
    local = [str(out)] * isinstance(out, Path) + [file.path for file in sources if not is_remote(file.path)]
    if local:
        raise ConfigError(f"--runner dataflow: its machines do not see {local[0]}; read from and write to gs://")


def _plain(error: Exception, runner: str) -> UserError:
    """The error that a worker raised, of its own class if it is one of ours."""
    found = _OURS.search(str(error))
    kind = getattr(errors, found[1], None) if found else None
    if found and isinstance(kind, type) and issubclass(kind, UserError):
        return kind(found[2])
    last = str(error).strip().rpartition("\n")[2][:300]
    return PeerError(f"--runner {runner}: {type(error).__name__}: {last}; the same command continues")
