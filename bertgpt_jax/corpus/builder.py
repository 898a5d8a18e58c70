"""Building a tokenised corpus: plan, tokenizer, shards, manifest; each step is skipped if it is already there."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bertgpt_jax.config import identity
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.corpus.duplicates import DUPLICATES, HASHES, ensure_duplicates, remove_duplicates
from bertgpt_jax.corpus.files import SourceFile, check_unchanged
from bertgpt_jax.corpus.kinds import load_tokenizer, open_tokenizer, train_tokenizer
from bertgpt_jax.corpus.memory import peak_resident_bytes
from bertgpt_jax.corpus.places import (
    BucketPath,
    Place,
    find_place,
    is_empty,
    remove_named,
    remove_tree,
    write_whole,
)
from bertgpt_jax.corpus.plan import PLAN_FILE, Plan, expected_shards, find_request, make_plan, write_plan
from bertgpt_jax.corpus.pool import Pool
from bertgpt_jax.corpus.reader import FORMAT_VERSION, MANIFEST, CorpusReader, content_fingerprint, read_manifest
from bertgpt_jax.corpus.report import Work, nothing_left, report_lines
from bertgpt_jax.corpus.shards import sample_shard, shard_documents, tokenise_shard
from bertgpt_jax.corpus.stdin import spooled
from bertgpt_jax.corpus.store import read_done, shard_name
from bertgpt_jax.corpus.tokenizer import CONFIG_FILE, Tokenizer
from bertgpt_jax.errors import ConfigError, DataError, StorageError

_PARTS = ("plan.", ".plan.", "tokenizer", ".tokenizer.", "shard-", ".shard-", DUPLICATES, HASHES)
"""How the names of what a build writes before its manifest begin."""
_COLUMNS = ("documents", "train_documents", "tokens", "train_tokens", "bytes", "train_bytes", "sentences", "unknown")

Report = Callable[[str], None]
Elsewhere = Callable[[Place, list[int]], None]
"""Tokenises shards of a planned corpus."""


def open_corpus(config: CorpusConfig, cache_root: str | Path, progress: bool | Report = True) -> CorpusReader:
    """The corpus of a config: the prepared directory `config.path` names, or one prepared below `cache_root`.

    Prepared corpora lie in `cache_root/<first 12 digits of the request>`, so equal settings over equal sources are
    prepared once.
    """
    prepared = prepared_path(config)
    if prepared is not None:
        reader = CorpusReader(prepared)
        _check_tokenizer(reader, config)
        return reader
    config = spooled(config, Path(cache_root))
    files, request = find_request(config)
    return CorpusReader(_build(config, files, request, Path(cache_root) / request[:12], progress))


def prepare_corpus(
    config: CorpusConfig, out: str | Path, progress: bool | Report = True, elsewhere: Elsewhere | None = None
) -> Place:
    """Makes the tokenised corpus `out`; returns at once if it is there, continues if it is half there.

    Args:
        out: a directory, or an address in a bucket.
        progress: a bar on a terminal (lines elsewhere) and a closing report; a function gets the report's lines.
        elsewhere: tokenises the shards, instead of processes of this machine.

    Raises:
        ConfigError: `out` holds a corpus of other settings; the source path is wrong.
        DataError: a source or tokenizer file is damaged, or no document is left after cleaning. After these two
            nothing is left of what this call began.
        StorageError: something cannot be read or written. PeerError: a worker died.
    """
    place = find_place(out)
    if isinstance(place, Path):
        config = spooled(config, place.absolute().parent)
    elif config.filters.duplicates == "drop":
        raise ConfigError(f"corpus.filters.duplicates = 'drop': its index cannot lie in {out}; prepare to a directory")
    return _build(config, *find_request(config), place, progress, elsewhere)


def prepared_path(config: CorpusConfig) -> Place | None:
    """The prepared corpus that a config names; None if it names text. DataError if it is unfinished."""
    if not isinstance(config.path, str) or not config.path:
        return None
    path = find_place(config.path)
    if (path / MANIFEST).is_file():
        return path
    if (path / PLAN_FILE).is_file() and (path / "tokenizer" / CONFIG_FILE).is_file():
        read_manifest(path)  # says that it is unfinished
    return None


def _check_tokenizer(reader: CorpusReader, config: CorpusConfig) -> None:
    """A prepared corpus brings its tokenizer; a config that names another one contradicts it."""
    if config.tokenizer.path and open_tokenizer(config.tokenizer).sha256 != reader.manifest["tokenizer"]["sha256"]:
        raise ConfigError(
            f"tokenizer.path = '{config.tokenizer.path}' is not the tokenizer of the prepared corpus {reader.path}; "
            "drop one of the two settings"
        )


def _build(
    config: CorpusConfig,
    files: tuple[SourceFile, ...],
    request: str,
    out: Place,
    progress: bool | Report,
    elsewhere: Elsewhere | None = None,
) -> Place:
    report = progress if callable(progress) else _print_line if progress else lambda line: None
    if (out / MANIFEST).is_file():
        _check_same(read_manifest(out)["request"], request, out)
        return out
    begun = (out / PLAN_FILE).is_file()
    if begun:
        _check_same(_request_of(out / PLAN_FILE), request, out)
    elif not is_empty(out):
        raise ConfigError(f"{out} exists and is no tokenised corpus; choose an empty directory")
    try:
        _make(config, files, request, out, progress is True, report, elsewhere)
    except (ConfigError, DataError):
        if not begun and elsewhere is None:
            remove_named(out, _PARTS)  # the settings or the text must change, and then it would not be continued
        raise
    return out


def _make(
    config: CorpusConfig,
    files: tuple[SourceFile, ...],
    request: str,
    out: Place,
    show: bool,
    report: Report,
    elsewhere: Elsewhere | None,
) -> None:
    """Plan, tokenizer, shards and manifest, as far as they are not there."""
    most = (config.workers if config.workers >= 0 else os.cpu_count() or 1) if elsewhere is None else 0
    with ExitStack() as stack:
        pool = stack.enter_context(Pool(out / PLAN_FILE, out)) if most else None
        if pool:  # they start while the plan is made
            pool.start(min(most, expected_shards(config, files)))
        plan = make_plan(config, files, request)
        if config.filters.duplicates == "drop":
            plan = dataclasses.replace(plan, duplicates=str((Path(out) / DUPLICATES).absolute()))
        write_plan(plan, out)
        if pool:
            pool.start(min(most, len(plan.shards)))
        if plan.duplicates and not all(_finished(plan, out, i) for i in range(len(plan.shards))):
            ensure_duplicates(plan, out, pool, report)
        tokenizer = _ensure_tokenizer(plan, out, pool, report)
        work = _tokenise_missing(plan, out, tokenizer, elsewhere or pool, show=show, report=report)
    manifest = _manifest(plan, out, tokenizer)
    if not sum(manifest["shards"]["documents"]):
        raise DataError(nothing_left(plan.config.path, manifest["cleaning"]))
    for file in files:
        check_unchanged(file)
    remove_duplicates(out)
    write_whole(out / MANIFEST, json.dumps(manifest, ensure_ascii=False) + "\n")
    for line in report_lines(manifest, work, out):
        report(line)


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _request_of(path: Place) -> str:
    try:
        return json.loads(path.read_text())["request"]
    except (OSError, ValueError, KeyError):
        raise StorageError(f"{path}: cannot be read; delete its directory and prepare again") from None


def _check_same(found: str, request: str, out: Place) -> None:
    if found != request:
        raise ConfigError(
            f"{out} holds a corpus of other sources or settings ({found[:12]}, asked for {request[:12]}); "
            "choose another directory or delete it"
        )


# ---------------------------------------------------------------- tokenizer


def _ensure_tokenizer(plan: Plan, out: Place, pool: Pool | None, report: Report) -> Tokenizer:
    """The tokenizer in `out/tokenizer`: there already, loaded, or trained on the train documents."""
    target = out / "tokenizer"
    if (target / CONFIG_FILE).is_file():
        return load_tokenizer(target)
    if plan.config.tokenizer.path:
        tokenizer = open_tokenizer(plan.config.tokenizer)
    else:
        started = time.monotonic()
        texts = sample_texts(plan, pool, plan.config.tokenizer.sample_bytes)
        if not texts:
            raise DataError(_why_no_text(plan))
        tokenizer = train_tokenizer(texts, plan.config.tokenizer)
        seconds = time.monotonic() - started
        report(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} pieces, trained in {seconds:.1f} s")
    if isinstance(target, BucketPath):
        tokenizer.save(target)
        return tokenizer
    temporary = target.with_name(f".tokenizer.{os.getpid()}")
    tokenizer.save(temporary)
    try:
        os.rename(temporary, target)
    except OSError:  # another process was first
        shutil.rmtree(temporary, ignore_errors=True)
        return load_tokenizer(target)
    return tokenizer


def _why_no_text(plan: Plan) -> str:
    """The message for a source without a single train document."""
    counts: Counter[str] = Counter()
    held_out = sum(1 for i in range(len(plan.shards)) for _ in shard_documents(plan, i, counts))
    if held_out:
        return f"corpus.path: all {held_out} documents are held out; lower held_out.fraction or bring more text"
    return nothing_left(plan.config.path, counts)


def sample_texts(plan: Plan, pool: Pool | None, max_bytes: int, max_documents: int = 1 << 62) -> list[str]:
    """Train documents, at most about `max_bytes` of them: an equal share from the start of every shard."""
    count = len(plan.shards)
    share, documents = -(-max_bytes // count), -(-max_documents // count)
    if pool is None:
        return [text for i in range(count) for text in sample_shard(plan, i, share, documents)][:max_documents]
    commands = ({"sample": i, "bytes": share, "documents": documents} for i in range(count))
    found = {command["sample"]: answer["texts"] for command, answer in pool.run(commands, lambda a: "texts" in a)}
    return [text for i in range(count) for text in found[i]][:max_documents]


# ---------------------------------------------------------------- shards


def _tokenise_missing(
    plan: Plan, out: Place, tokenizer: Tokenizer, means: Pool | Elsewhere | None, show: bool, report: Report
) -> Work:
    """Tokenises the shards that are not finished, large ones first, by the means given or in this process."""
    count = len(plan.shards)
    missing = [i for i in range(count) if not _finished(plan, out, i)]
    missing.sort(key=plan.shard_size, reverse=True)
    if len(missing) < count:
        report(f"continuing: {count - len(missing)} of {count} shards are finished")
    size, peak, started = 0, 0, time.monotonic()
    bar = tqdm(total=len(missing), unit="shard", disable=not (show and sys.stderr.isatty()), desc="tokenising")
    with bar:
        if means is None:
            for index in missing:
                tokenise_shard(plan, index, tokenizer, out)
                bar.update()
        elif callable(means):
            if missing:
                means(out, missing)
            bar.update(len(missing))
        else:
            for _, answer in means.run(({"tokenise": i} for i in missing), lambda a: "done" in a):
                size += answer.get("progress", 0)
                bar.set_postfix_str(f"{size / 1e6 / (time.monotonic() - started):.1f} MB/s", refresh=False)
                if "done" in answer:
                    peak = max(peak, answer["peak_bytes"])
                    bar.update()
    return Work(tuple(missing), time.monotonic() - started, peak, peak_resident_bytes())


def _finished(plan: Plan, out: Place, index: int) -> bool:
    """Whether a shard is there; one that is damaged or of another request is removed."""
    directory = out / shard_name(index, len(plan.shards))
    row = read_done(directory)
    if row is not None and row.get("request") == plan.request:
        return True
    remove_tree(directory)
    return False


# ---------------------------------------------------------------- manifest


def _manifest(plan: Plan, out: Place, tokenizer: Tokenizer) -> dict[str, Any]:
    rows = [read_done(out / shard_name(i, len(plan.shards))) or {} for i in range(len(plan.shards))]
    cleaning: Counter[str] = Counter()
    for row in rows:
        cleaning.update(row["cleaning"])
    shards = {name: [row[name] for row in rows] for name in (*_COLUMNS, "sha256")}
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "request": plan.request,
        "config": identity(plan.config),
        "tokenizer": {
            "kind": tokenizer.kind,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "special": dataclasses.asdict(tokenizer.special),
            "files": sorted(tokenizer.files),
        },
        "sources": {
            "name": [f.name for f in plan.files],
            "format": [f.format for f in plan.files],
            "size": [f.size for f in plan.files],
            "digest": [f.digest for f in plan.files],
        },
        "cleaning": dict(sorted(cleaning.items())),
        "totals": {name: sum(shards[name]) for name in _COLUMNS},
        "shards": shards,
    }
    return manifest | {"fingerprint": content_fingerprint(manifest)}
