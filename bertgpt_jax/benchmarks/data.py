"""Benchmark `data`: how fast batches are made, beside other collators and beside the step that eats them.

Tokens are those of text and special tokens; padding is not counted. Our sides read a tokenised corpus on disk in
shuffled order; the rows of the peers are in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.examples import Examples
from bertgpt_jax.batches.masking import Masking, mask_tables
from bertgpt_jax.batches.packing import PackedDocuments, PackedPairs
from bertgpt_jax.batches.pairs import SentencePairs
from bertgpt_jax.batches.pipeline import prefetch
from bertgpt_jax.batches.ramp import Ramped
from bertgpt_jax.batches.windows import FullDocuments, Windows
from bertgpt_jax.benchmarks.harness import Result, Row, Side, compare, rate, require
from bertgpt_jax.config import Config, load_config
from bertgpt_jax.corpus.builder import open_corpus
from bertgpt_jax.corpus.config import CorpusConfig, WordPieceConfig
from bertgpt_jax.corpus.reader import CorpusReader
from bertgpt_jax.errors import DataError

SAMPLE = Path("../shared/data/lm/enwiki-sample")
"""English Wikipedia beside the checkout; Python's own documentation where it is not there."""

MASK_SHARE_APART = 0.01
"""How far the shares of tokens that two sides predict may differ while they still do the same work."""


class Settings(Config):
    """Settings of the benchmark."""

    text: str = Field(default="", description="a source of text or a prepared corpus; '' takes a sample")
    cache: str = Field(default="", description="where the corpora are prepared and kept; '' throws them away")
    parts: tuple[Literal["collator", "grain", "store", "loader"], ...] = ("collator", "grain", "store", "loader")
    vocab_size: int = Field(default=8192, gt=6)
    length: int = Field(default=128, ge=16)
    window: int = Field(default=1024, ge=8, description="tokens of a causal window")
    packed_length: int = Field(default=512, ge=16)
    tokens: int = Field(default=32_768, ge=1024, description="of a batch, padding included")
    batches: int = Field(default=16, ge=1, description="made in a timed step")
    loader_steps: int = Field(default=20, ge=1, description="batches and updates in a timed step of `loader`")
    threads: int = Field(default=2, ge=1, description="of the loader")
    rounds: int = Field(default=11, ge=1)
    warmup: int = Field(default=2, ge=0)


def run(settings: Settings) -> Result:
    """Measures every part that is asked for."""
    if "collator" in settings.parts:
        require("torch", "transformers", extra="parity", purpose="benchmark data: its part 'collator'")
    with contextlib.ExitStack() as stack:
        cache = settings.cache or stack.enter_context(tempfile.TemporaryDirectory())
        found = Result((), {})
        if {"collator", "grain", "store"} & set(settings.parts):
            corpus = open_sample(settings, Path(cache))
            found = _joined(found, Result((), {}, facts={"corpus": described(corpus)}))
        for part in settings.parts:
            more = loader(settings, Path(cache)) if part == "loader" else PARTS[part](settings, corpus)
            found = _joined(found, more)
    return found


def _joined(a: Result, b: Result) -> Result:
    return Result(a.rows + b.rows, a.comparisons | b.comparisons, a.ratios | b.ratios, a.facts | b.facts)


def open_sample(settings: Settings, cache: Path) -> CorpusReader:
    """The corpus that is read, prepared if it is text."""
    text = settings.text or (str(SAMPLE) if SAMPLE.is_dir() else "stdlib")
    tokenizer = WordPieceConfig(vocab_size=settings.vocab_size)
    return open_corpus(CorpusConfig(path=text, tokenizer=tokenizer), cache, progress=False)


def described(corpus: CorpusReader) -> dict[str, Any]:
    """What a reader needs to know of a corpus."""
    return {
        "documents": int(corpus.documents.sum()),
        "tokens": int(corpus.tokens.sum()),
        "vocab_size": corpus.vocab_size,
        "fingerprint": corpus.fingerprint,
    }


def make(corpus: CorpusReader, examples: Examples, masking: Masking | None, length: int, tokens: int) -> Dataset:
    """A dataset of batches of about `tokens` tokens."""
    return Dataset(corpus, examples, masking, sequence_length=length, batch_size=max(1, tokens // length), seed=1)


def dataset_side(name: str, dataset: Dataset | Ramped, batches: int, threads: int) -> Side:
    """The next `batches` batches, never the same twice, so that planning an epoch is paid for like in training.

    Args:
        threads: of the loader; 0 makes each batch when it is asked for.
    """

    def step(first: Iterator[int]) -> None:
        begin = next(first)
        for _ in prefetch(dataset.batch, begin, begin + batches, threads, max(1, batches)):
            pass

    return Side(name, lambda: itertools.count(0, batches), step)


# ---------------------------------------------------------------- collators


def collator(settings: Settings, corpus: CorpusReader) -> Result:
    """One thread of ours against one call of the collator, single tokens and whole words."""
    from bertgpt_jax.benchmarks.data_peers import collator_side

    size, vocabulary = max(1, settings.tokens // settings.length), corpus.path / "tokenizer" / "vocab.txt"
    result = Result((), {})
    for words, label in ((False, "mlm"), (True, "whole_word")):
        dataset = make(corpus, FullDocuments(), Masking(whole_word=words), settings.length, settings.tokens)
        rows = unmasked(dataset)
        peers = [
            collator_side(
                f"{label}_{kind}", rows, vocabulary, size, settings.batches,
                return_tensors=kind, whole_word_mask=words,
            )
            for kind in ("pt", "np")
        ]  # fmt: skip
        sides = [dataset_side("ours", dataset, settings.batches, 0), *peers]
        found = compare(sides, settings.rounds, settings.warmup)
        what = "whole-word masks" if words else "MLM batches"
        name = "its whole-word collator" if words else "Hugging Face's collator"
        shown = [
            Row(
                f"{what} at {settings.length} over {name}, tensors '{kind}'",
                found["paired"][f"{label}_{kind}"]["median"],
                "x",
                10.0,
            )
            for kind in ("pt", "np")
        ]
        speed = rate(found, "ours", settings.batches * dataset.tokens_per_batch)
        shown.append(Row(f"{what} at {settings.length}, one thread", speed, "tokens/s"))
        facts = {f"{label}_predicted_share": predicted_share(dataset)}
        result = _joined(result, Result(tuple(shown), {label: found}, found["ratios"], facts))
    return result


def unmasked(dataset: Dataset, batches: int = 8):
    """The rows of the first batches as they were before masking, for the peers."""
    from bertgpt_jax.benchmarks.data_peers import Rows

    corpus, kept = dataset.corpus, []
    for n in range(min(batches, dataset.rows_per_epoch(0) // dataset.batch_size)):
        batch = dataset.batch(n)
        row, slot = np.nonzero(batch["mask_weights"])
        batch["tokens"][row, batch["mask_positions"][row, slot]] = batch["mask_labels"][row, slot]
        kept.append(batch["tokens"])
    tokens = np.concatenate(kept)
    continues = np.array([corpus.tokenizer.token(i).startswith("##") for i in range(corpus.vocab_size)])
    return Rows(tokens, corpus.special_mask()[tokens], ~continues[tokens])


def predicted_share(dataset: Dataset) -> float:
    """Predicted tokens over real tokens of a batch."""
    batch = dataset.batch(0)
    return float(batch["mask_weights"].sum() / (batch["segments"] > 0).sum())


# ---------------------------------------------------------------- Grain


def per_record(settings: Settings, corpus: CorpusReader) -> Result:
    """Our loader against Grain mapping and batching single records, with as many threads."""
    from bertgpt_jax.benchmarks.data_peers import MaskRecord, grain_side

    masking = Masking()
    dataset = make(corpus, FullDocuments(), masking, settings.length, settings.tokens)
    rows = unmasked(dataset)
    tables = mask_tables(masking, corpus.special.mask, corpus.special_mask())
    record = MaskRecord(masking, tables, masking.predictions(settings.length))
    masked = [record.random_map(row, np.random.default_rng(i)) for i, row in enumerate(rows.tokens[:256])]
    theirs = float(np.mean([m["mask_weights"].sum() for m in masked]) / settings.length)
    if abs(theirs - predicted_share(dataset)) > MASK_SHARE_APART:
        raise DataError(f"grain predicts {theirs:.3f} of the tokens, ours {predicted_share(dataset):.3f}: not one work")
    batches = max(settings.threads, settings.batches // 4)
    peer = grain_side("grain", rows, masking, tables, dataset.batch_size, batches, settings.threads)
    ours = dataset_side("ours", dataset, batches, settings.threads)
    found = compare([ours, peer], settings.rounds, settings.warmup)
    row = Row(
        f"the same by Grain, record by record, {settings.threads} threads each",
        found["paired"]["grain"]["median"],
        "x",
        5.0,
    )
    return Result((row,), {"grain": found}, found["ratios"], {"grain_predicted_share": theirs})


# ---------------------------------------------------------------- through the store


def store(settings: Settings, corpus: CorpusReader) -> Result:
    """Tokens a second of the loader, by kind of example; and of causal windows read through the cache of chunks."""
    small = CorpusReader(corpus.path, memory_budget=int(corpus.tokens.sum()) // 2)
    length, packed, tokens, masks = settings.length, settings.packed_length, settings.tokens, Masking()
    causal = f"causal windows of {settings.window:,}"
    kinds = {
        "windows": (causal, make(corpus, Windows(), None, settings.window, tokens), 10e6),
        "windows_cached": (
            f"{causal}, memory for a quarter",
            make(small, Windows(), None, settings.window, tokens),
            None,
        ),
        "pairs": (f"pairs of {length} with masks", make(corpus, SentencePairs(), masks, length, tokens), 3e6),
        "packed_pairs": (
            f"packed pairs of {packed} with masks",
            make(corpus, PackedPairs(), masks, packed, tokens),
            3e6,
        ),
        "packed": (f"packed rows of {packed} with masks", make(corpus, PackedDocuments(), masks, packed, tokens), 3e6),
        "packed_causal": (
            f"packed rows of {packed}, causal",
            make(corpus, PackedDocuments(), None, packed, tokens),
            None,
        ),
    }
    sides = [dataset_side(name, made, settings.batches, settings.threads) for name, (_, made, _) in kinds.items()]
    found = compare(sides, settings.rounds, settings.warmup)
    rows, facts = [], {}
    for name, (label, dataset, bar) in kinds.items():
        filled = dataset.packing_efficiency()
        work = settings.batches * dataset.tokens_per_batch * filled
        rows.append(Row(f"{label}, {settings.threads} threads", rate(found, name, work), "tokens/s", bar))
        facts[f"{name}_filled"] = filled
    return Result(tuple(rows), {"store": found}, facts=facts)


# ---------------------------------------------------------------- beside a step


def loader(settings: Settings, cache: Path) -> Result:
    """Batches of the quickstart's loader in the time of its updates, stage by stage."""
    import jax

    from bertgpt_jax.parallel.mesh import make_mesh
    from bertgpt_jax.training import setup
    from bertgpt_jax.training.data import make_train
    from bertgpt_jax.training.run_config import RunConfig, with_vocabulary

    config = load_config("quickstart", RunConfig)
    corpus = open_corpus(config.corpus, cache, progress=False)
    config = with_vocabulary(config, corpus.vocab_size)
    program = setup.make_program(config, make_mesh(config.execution.mesh))
    result, steps = Result((), {}), settings.loader_steps
    for index, stage in enumerate(config.stages):
        train = make_train(config, index, 0, corpus, cache)
        update = setup.lower_train_step(program, stage).compile()
        batch = jax.device_put(train.batch(0), jax.tree.map(lambda x: x.sharding, program.abstract_batch(stage)))
        step = Side("step", lambda: [program.init()], _updates(update, batch, steps))
        ours = dataset_side("ours", train, steps, config.execution.data_threads)
        found = compare([ours, step], settings.rounds, settings.warmup)
        label = f"quickstart_{stage.name}"
        row = Row(
            f"quickstart {stage.name}: batches loaded in the time of an update",
            found["paired"]["step"]["median"],
            "x",
            20.0,
        )
        result = _joined(result, Result((row,), {label: found}, {label: found["ratios"]["step"]}))
    return result


def _updates(update: Callable, batch: Any, steps: int) -> Callable[[list[Any]], None]:
    """The timed step: `steps` updates on one batch; the state moves on, because its buffers are given away."""
    import jax

    def step(held: list[Any]) -> None:
        for _ in range(steps):
            held[0], _ = update(held[0], batch)
        jax.block_until_ready(held[0])

    return step


PARTS: dict[str, Callable[[Settings, CorpusReader], Result]] = {
    "collator": collator,
    "grain": per_record,
    "store": store,
}
"""Parts that read the sample; `loader` has a corpus of its own."""
