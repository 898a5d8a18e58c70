"""Mixtures: several corpora, each prepared on its own, all with one tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bertgpt_jax.config import Config, build, fingerprint
from bertgpt_jax.corpus.builder import Report, open_corpus, prepared_path
from bertgpt_jax.corpus.config import CorpusConfig, TokenizerConfig, WordPieceConfig
from bertgpt_jax.corpus.reader import CorpusReader
from bertgpt_jax.corpus.special import SpecialIds
from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.errors import ConfigError

log = logging.getLogger(__name__)

_DECIDE_THE_SPLIT = ("held_out", "seed", "cleaning", "format", "text_field", "separator")
"""Settings of a corpus that say on which side of its split a document falls."""


class MixturePart(Config):
    """One corpus of a mixture: `weight` is its share of the rows; or `epochs`, how often the mixture reads it an epoch.

    Its own `corpus.tokenizer` is left at its default: the mixture has one for all.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    corpus: CorpusConfig
    weight: float | None = Field(default=None, ge=0)
    epochs: float | None = Field(default=None, gt=0)


class WeightsFrom(Config):
    """The weights that hold from a batch on, in the order of the parts; 0 leaves a part out."""

    from_step: int = Field(ge=1)
    """Counted through all stages, as the steps of `metrics.jsonl` are."""
    weights: tuple[Annotated[float, Field(ge=0)], ...]


class MixtureConfig(Config):
    """Several corpora in every batch, each with its share of the rows (GPT-3, table 2.2).

    All are cut by one tokenizer: `tokenizer.path`, or that of the first part (trained on it unless it is prepared).
    Measured in epochs, a stage counts one when as many rows were drawn as the parts have together, or, where the parts
    say `epochs`, when each was read that often. Held out documents stay apart by part: all are evaluated, together and
    part by part.
    """

    kind: Literal["mixture"] = "mixture"
    parts: tuple[MixturePart, ...] = Field(min_length=1)
    tokenizer: TokenizerConfig = WordPieceConfig()
    total: float = Field(1.0, gt=0)
    """What the weights add up to, those of the schedule too (published tables are rounded: GPT-3's is 101)."""
    schedule: tuple[WeightsFrom, ...] = ()
    """Other weights from a step on. A resume may add to its end what lies ahead."""
    when_exhausted: Literal["wrap", "error"] = "wrap"
    """A part that was read once, or its `epochs`, is read again in another order; or stops the run before it starts."""

    @model_validator(mode="after")
    def _adds_up(self) -> MixtureConfig:
        problems = [*_part_problems(self), *_weight_problems(self)]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _part_problems(mixture: MixtureConfig) -> list[str]:
    problems = []
    twice = [name for name, count in Counter(part.name for part in mixture.parts).items() if count > 1]
    if twice:
        problems.append(f"two parts of the mixture are called '{twice[0]}'; names must differ")
    for part in mixture.parts:
        if part.corpus.tokenizer not in (WordPieceConfig(), mixture.tokenizer):
            problems.append(
                f"part '{part.name}' has a tokenizer of its own ({part.corpus.tokenizer.kind}); a mixture has one for "
                "all: set it as corpus.tokenizer"
            )
        if (part.weight is None) == (part.epochs is None):
            problems.append(f"part '{part.name}' must have one of weight and epochs")
    if any(part.weight is None for part in mixture.parts) and any(part.epochs is None for part in mixture.parts):
        problems.append("give all parts of the mixture a weight, or all of them epochs")
    return problems


def _weight_problems(mixture: MixtureConfig) -> list[str]:
    if any(part.weight is None for part in mixture.parts):
        return ["schedule changes weights, and the parts of the mixture have epochs"] if mixture.schedule else []
    problems, count = [], len(mixture.parts)
    lists = [("the weights", tuple(part.weight for part in mixture.parts))]
    lists += [(f"schedule: the weights from step {change.from_step}", change.weights) for change in mixture.schedule]
    for what, weights in lists:
        if len(weights) != count:
            problems.append(f"{what} are {len(weights)}, the parts of the mixture {count}")
        elif abs(sum(weights) - mixture.total) > 1e-6 * mixture.total:
            problems.append(f"{what} add up to {sum(weights):.6g}, not to total = {mixture.total:.6g}")
    steps = [change.from_step for change in mixture.schedule]
    if steps != sorted(set(steps)):
        problems.append(f"schedule: the steps {steps} must increase")
    for i, part in enumerate(mixture.parts):
        if not any(weights[i] for _, weights in lists if i < len(weights)):
            problems.append(f"part '{part.name}' has weight 0 throughout; leave it out")
    return problems


# ---------------------------------------------------------------- opening


@dataclasses.dataclass(frozen=True)
class CorpusMixture:
    """The tokenised corpora of a mixture by name, the first of which lends its tokenizer.

    Raises:
        ConfigError: two of them were made with different tokenizers.
    """

    readers: dict[str, CorpusReader]

    def __post_init__(self) -> None:
        first, *others = self.readers
        wanted = self.readers[first].tokenizer.sha256
        for name in others:
            reader = self.readers[name]
            if reader.tokenizer.sha256 != wanted:
                raise ConfigError(
                    f"the mixture's corpus '{name}' ({reader.path}) has a tokenizer with sha256 "
                    f"{reader.tokenizer.sha256[:12]}, '{first}' ({self.readers[first].path}) one with {wanted[:12]}; "
                    f"prepare one with the other's, tokenizer.path={self.readers[first].path / 'tokenizer'}"
                )

    @property
    def first(self) -> CorpusReader:
        """The corpus whose tokenizer is the mixture's."""
        return next(iter(self.readers.values()))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.first.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.first.vocab_size

    @property
    def special(self) -> SpecialIds:
        return self.first.special

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the content of all, in their order."""
        return fingerprint([[name, reader.fingerprint] for name, reader in self.readers.items()])


def open_any(
    config: CorpusConfig | MixtureConfig, cache_root: str | Path, progress: bool | Report = True
) -> CorpusReader | CorpusMixture:
    """What a run's `corpus` names, prepared below `cache_root` where it is not there yet (see `open_corpus`)."""
    if isinstance(config, CorpusConfig):
        return open_corpus(config, cache_root, progress)
    readers: dict[str, CorpusReader] = {}
    tokenizer = config.tokenizer.model_dump(mode="json")
    for part in config.parts:
        tree = part.corpus.model_dump(mode="json")
        if not (config.tokenizer.path == "" and prepared_path(part.corpus)):  # a prepared one brings its own
            tree["tokenizer"] = tokenizer
        readers[part.name] = open_corpus(build(CorpusConfig, tree, f"part '{part.name}'"), cache_root, progress)
        if config.tokenizer.path == "":
            first = next(iter(readers.values()))
            tokenizer = {"kind": first.tokenizer.kind, "path": str(first.path / "tokenizer")}
    for line in overlaps(readers):
        _warn_once(line)
    return CorpusMixture(readers)


def overlaps(readers: Mapping[str, CorpusReader]) -> list[str]:
    """A line for each two corpora with a source file in common that they split differently, by the files' hashes."""
    lines = []
    for (one, a), (other, b) in itertools.combinations(readers.items(), 2):
        names = dict(zip(a.manifest["sources"]["digest"], a.manifest["sources"]["name"], strict=True))
        shared = [names[digest] for digest in b.manifest["sources"]["digest"] if digest in names]
        settings = [{key: x.manifest["config"].get(key) for key in _DECIDE_THE_SPLIT} for x in (a, b)]
        differ = [key for key in _DECIDE_THE_SPLIT if settings[0][key] != settings[1][key]]
        if shared and differ:
            lines.append(
                f"the mixture's corpora '{one}' and '{other}' share {len(shared)} source files ({shared[0]}), but not "
                f"{', '.join(differ)}: what one holds out the other trains on; give both the same settings"
            )
    return lines


@functools.cache
def _warn_once(line: str) -> None:
    log.warning(line)


def open_prepared(path: str | Mapping[str, str]) -> CorpusReader | CorpusMixture:
    """A prepared corpus, or a mixture of those that lie at `path[name]`."""
    if isinstance(path, str):
        return CorpusReader(path)
    return CorpusMixture({name: CorpusReader(where) for name, where in path.items()})
