"""What a step of a run was made of: documents and where they come from, text, masks, from the config alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bertgpt_jax.batches.dataset import Batch
from bertgpt_jax.config import build
from bertgpt_jax.corpus.mixture import CorpusMixture, open_prepared
from bertgpt_jax.corpus.reader import CorpusReader
from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.errors import ConfigError, DataError, UsageError
from bertgpt_jax.evaluation.workdir import moved
from bertgpt_jax.training import resume, storage
from bertgpt_jax.training.data import make_train
from bertgpt_jax.training.run_config import RunConfig
from bertgpt_jax.training.workdir import cache_root


def replay(
    workdir_text: str,
    step: int,
    rows: Sequence[int] | None = None,
    process: tuple[int, int] | None = None,
    corpus_path: str | None = None,
) -> dict[str, Any]:
    """The rows of a step, rebuilt from a run's config and corpus.

    Args:
        step: as `metrics.jsonl` counts, from 1: the row of step N there is of batch N-1 of the run.
        rows: which of the global batch; None: all.
        process: (i, n): only the rows that process i of n builds, where the batch is split over n processes.
        corpus_path: where the prepared corpus is now (a mixture's: `name=path,...`); None: where training found it.

    Returns:
        `step`, `stage`, `batch` (its number in the stage), `batch_size`, `sequence_length` and `rows`; see `describe`.

    Raises:
        ConfigError: no run there, or no such step in it. DataError: another corpus than the run's.
        UsageError: rows or processes that the batch does not have.
    """
    workdir = storage.workdir_path(workdir_text)
    tree = storage.read_json(workdir / resume.CONFIG_FILE)
    recorded = storage.read_json(workdir / "corpus.json")
    if tree is None or recorded is None:
        raise ConfigError(f"'{workdir}' is not the workdir of a run: it has no {resume.CONFIG_FILE} and corpus.json")
    config = build(RunConfig, tree, str(workdir / resume.CONFIG_FILE))
    corpus = open_prepared(moved(recorded["path"], corpus_path))
    if corpus.fingerprint != recorded["fingerprint"]:
        raise DataError(
            f"the corpus in {corpus_path or recorded['path']!r} has fingerprint {corpus.fingerprint[:12]}, the run's "
            f"has {recorded['fingerprint'][:12]}; pass the run's with --corpus"
        )
    index, start = find_stage(config, step)
    train = make_train(config, index, start, corpus, cache_root(workdir))
    n = step - 1 - start
    segment = train.ramp.segment(n)
    wanted = chosen_rows(segment.batch_size, rows, process)
    batch, described = train.batch(n, wanted), train.describe(n, wanted)
    return {
        "step": step,
        "stage": config.stages[index].name,
        "batch": n,
        "batch_size": segment.batch_size,
        "sequence_length": segment.sequence_length,
        "rows": [
            {"row": int(row)} | describe(corpus, {name: values[i] for name, values in batch.items()}, described[i])
            for i, row in enumerate(wanted)
        ],
    }


def find_stage(config: RunConfig, step: int) -> tuple[int, int]:
    """(index of the stage that makes step `step`, steps before it); ConfigError if none does."""
    start = 0
    for index, stage in enumerate(config.stages):
        if start < step <= start + stage.steps:
            return index, start
        start += stage.steps
    lengths = ", ".join(f"{stage.name} {stage.steps:,}" for stage in config.stages)
    raise ConfigError(f"--step {step}: the run has steps 1..{start:,} ({lengths})")


def chosen_rows(size: int, rows: Sequence[int] | None, process: tuple[int, int] | None) -> np.ndarray:
    """int64[R]: the rows asked for, of those that a process builds; UsageError if there are none such.

    A batch lies on the processes in runs of equal length, in their order, as on every mesh whose batch axes lead.
    """
    first, last = 0, size
    if process is not None:
        i, n = process
        if n < 1 or not 0 <= i < n or size % n:
            raise UsageError(f"--process {i}/{n}: i is below n, and n divides the {size} rows of the batch")
        first, last = i * size // n, (i + 1) * size // n
    if rows is None:
        return np.arange(first, last)
    outside = [row for row in rows if not first <= row < last]
    if outside:
        raise UsageError(f"--rows {outside[0]}: the rows here are {first}..{last - 1}")
    return np.array(rows, np.int64)


def describe(corpus: CorpusReader | CorpusMixture, row: Batch, described: dict[str, Any]) -> dict[str, Any]:
    """One row in words.

    Args:
        row: its arrays, without the batch dimension.
        described: what `Dataset.describe` says of it.

    Returns:
        `epoch`, `example`, of a mixture `corpus`; `documents`: `shard`, `index`, `source`, `offset` (where it starts
        there), `first` and `end` (its tokens in the row), `text`; `text`: the row as it was; of a masked row `input`
        (as the model sees it) and `masks`: `position`, `label`, `shown` and `kind` (mask, random or kept); of pairs
        `next_labels` (1: B does not follow A); of a packed row `segments`, how many.
    """
    reader = corpus.readers[described["corpus"]] if isinstance(corpus, CorpusMixture) else corpus
    tokenizer, real = reader.tokenizer, _real(row)
    found = {name: value for name, value in described.items() if name != "documents"}
    found["documents"] = [document(reader, *place) for place in described["documents"]]
    tokens, masks = row["tokens"].copy(), []
    if "mask_positions" in row:
        used = row["mask_weights"] > 0
        places, labels = row["mask_positions"][used], row["mask_labels"][used]
        masks = [
            _mask(tokenizer, int(at), int(label), int(tokens[at])) for at, label in zip(places, labels, strict=True)
        ]
        found["input"] = tokenizer.decode(tokens[real])
        tokens[places] = labels
    elif row.get("weights") is not None and row["weights"].any():  # the last target is nobody's input
        tokens, real = np.append(tokens, row["targets"][-1]), np.append(real, row["weights"][-1] > 0)
    found["text"] = tokenizer.decode(tokens[real])
    if masks:
        found["masks"] = masks
    if "next_labels" in row:
        weights, labels = np.atleast_1d(row["next_weights"]), np.atleast_1d(row["next_labels"])
        found["next_labels"] = labels[weights > 0].tolist()
    if "segments" in row and row["segments"].max() > 1:
        found["segments"] = int(row["segments"].max())
    return found


def _real(row: Batch) -> np.ndarray:
    """bool[T]: False on padding."""
    if "segments" in row:
        return row["segments"] > 0
    real = row["weights"] > 0
    return real if real.any() else np.ones_like(real)


def _mask(tokenizer: Tokenizer, position: int, label: int, shown: int) -> dict[str, Any]:
    kind = "mask" if shown == tokenizer.special.mask else "kept" if shown == label else "random"
    return {"position": position, "label": tokenizer.token(label), "shown": tokenizer.token(shown), "kind": kind}


def document(reader: CorpusReader, shard: int, index: int, first: int, end: int) -> dict[str, Any]:
    """A stretch of a document: where it is in the corpus and in its source, and its text."""
    source, offset = reader.document_origin(shard, index)
    start, stop = (int(edge[0]) for edge in reader.document_spans(shard, index, index + 1))
    length = min(start + end, stop) - (start + first)  # without its terminator
    tokens = reader.gather(np.array([start + first]), np.array([max(length, 0)]))
    return {
        "shard": shard,
        "index": index,
        "source": source,
        "offset": offset,
        "first": first,
        "end": end,
        "text": reader.tokenizer.decode(tokens),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same as text, a few lines a row."""
    shape = f"{found['batch_size']} rows of {found['sequence_length']}"
    out = [f"step {found['step']:,}: batch {found['batch']:,} of stage {found['stage']}, {shape}"]
    for row in found["rows"]:
        extra = f", corpus {row['corpus']}" if "corpus" in row else ""
        if "next_labels" in row:
            extra += f", B random: {' '.join('no' if label == 0 else 'yes' for label in row['next_labels'])}"
        if "segments" in row:
            extra += f", {row['segments']} segments"
        out.append(f"row {row['row']}: epoch {row['epoch']}, example {row['example']}{extra}")
        for place in row["documents"]:
            where = f"{place['source']} at {place['offset']:,}"
            out.append(
                f"  document {place['shard']}/{place['index']} ({where}), tokens {place['first']}..{place['end'] - 1}"
            )
        if row.get("masks"):
            shown = (f"{m['position']} {m['label']} -> {m['shown']}" for m in row["masks"])
            out.append(f"  masks  {', '.join(shown)}")
        out.append(f"  text   {row['text']}")
        if "input" in row:
            out.append(f"  input  {row['input']}")
    return out
