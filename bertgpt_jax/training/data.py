"""The batches of a run: what its config, its corpora and the ramps of its stages come to."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.mixture import SLACK, Mixture
from bertgpt_jax.batches.ramp import Ramp, Ramped
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.corpus.mixture import CorpusMixture, MixtureConfig
from bertgpt_jax.corpus.view import Corpus
from bertgpt_jax.errors import ConfigError, DataError
from bertgpt_jax.training.run_config import RunConfig


def make_train(
    config: RunConfig, index: int, start: int, corpus: Corpus | CorpusMixture, cache_dir: Path, debug: bool = False
) -> Ramped:
    """The training batches of stage `index`, which begins at step `start` of the run."""
    ramp = config.stages[index].ramp()
    data: dict[int, Dataset | Mixture] = {}
    for length in dict.fromkeys(segment.sequence_length for segment in ramp.segments):
        make = partial(_dataset, config, index, "train", length, cache_dir, debug)
        if isinstance(corpus, CorpusMixture):
            parts = {name: make(part, (i, name)) for i, (name, part) in enumerate(corpus.readers.items())}
            data[length] = _mix(config, index, parts, ramp, start)
        else:
            data[length] = make(corpus)
    return Ramped(ramp, data)


def make_held_out(
    config: RunConfig, index: int, corpus: Corpus | CorpusMixture, cache_dir: Path | None, debug: bool = False
) -> Dataset | Mixture:
    """What stage `index` is evaluated on: the held-out split; of a mixture, those of the corpora that have one."""
    make = partial(_dataset, config, index, "held_out", config.stages[index].sequence_length, cache_dir, debug)
    if not isinstance(corpus, CorpusMixture):
        return make(corpus)
    having = {name: reader for name, reader in corpus.readers.items() if reader.split_tokens("held_out")}
    parts = {name: make(part, (i, name)) for i, (name, part) in enumerate((having or corpus.readers).items())}
    return Mixture(parts, [1.0] * len(parts), batch_size=config.stages[index].batch_size)


def _dataset(
    config: RunConfig,
    index: int,
    split: str,
    sequence_length: int,
    cache_dir: Path | None,
    debug: bool,
    corpus: Corpus,
    part: tuple[int, str] | None = None,
) -> Dataset:
    """The rows of one corpus, `part` its number and name in a mixture.

    Each stage has a seed of its own, lest it repeat the first; and each part, lest row n of all have the same masks.
    """
    stage, mixed = config.stages[index], split == "train" and part is not None
    try:
        return Dataset(
            corpus,
            config.objective.examples,
            config.objective.masking,
            split=split,
            sequence_length=sequence_length,
            batch_size=1 if mixed else stage.batch_size,  # one corpus need not fill a batch
            seed=config.seed + (index << 32) + (part[0] << 48 if part else 0),
            cache_dir=cache_dir,
            debug=debug,
        )
    except (ConfigError, DataError) as error:
        if part is None:
            raise
        raise type(error)(f"corpus '{part[1]}' of the mixture: {error}") from None


def _mix(config: RunConfig, index: int, parts: Mapping[str, Dataset], ramp: Ramp, start: int) -> Mixture:
    """The mixture of one sequence length of a stage; changes of weight are put where their step's first row is."""
    assert isinstance(config.corpus, MixtureConfig)
    described, seed, epoch_rows = config.corpus.parts, config.seed + (index << 32), None
    weights: Sequence[float] = [part.weight or 0.0 for part in described]
    if described[0].epochs is not None:
        weights = [part.epochs * parts[part.name].rows_per_epoch(0) for part in described]
        epoch_rows = round(sum(weights))
    length, changes = next(iter(parts.values())).sequence_length, []
    for change in config.corpus.schedule:
        if change.from_step <= start:
            weights = change.weights
        else:
            changes.append((ramp.rows_before(change.from_step - start).get(length, 0), change.weights))
    size = config.stages[index].batch_size
    return Mixture(parts, weights, changes, batch_size=size, seed=seed, epoch_rows=epoch_rows)


def check_enough(corpus: CorpusConfig | MixtureConfig, trains: Sequence[Ramped], steps: Sequence[int]) -> None:
    """DataError, naming the step, if a part of a mixture that must not wrap around runs out.

    Only the last batch of a stage may be filled up from what was read before.

    Args:
        trains, steps: of every stage.
    """
    if not isinstance(corpus, MixtureConfig) or corpus.when_exhausted == "wrap":
        return
    for part in corpus.parts:
        left, start = part.epochs or 1.0, 0
        for train, count in zip(trains, steps, strict=True):
            step = _exhausted_at(train, part.name, left, count)
            if step is not None:
                raise DataError(
                    f"corpus '{part.name}' of the mixture runs out at step {start + step:,}, having been read "
                    f"{part.epochs or 1:g} times; lower its weight or the steps, or set corpus.when_exhausted=wrap"
                )
            left, start = left - _epochs(train, part.name, count), start + count


def _exhausted_at(train: Ramped, name: str, epochs: float, steps: int) -> int | None:
    """The batch of 0..steps-2 that is the first to need more than `epochs` of a part; None if there is none."""
    allowed = epochs + SLACK / max(data.parts[name].rows_per_epoch(0) for data in train.data.values())
    first = bisect.bisect_right(range(steps), allowed, key=lambda n: _epochs(train, name, n))
    return first - 1 if first < steps else None


def _epochs(train: Ramped, name: str, n: int) -> float:
    return train.seen_before(n)[name]["epochs"]
