"""What the benchmarks of one GPU train: published sizes with their batches and bars, on text made up for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from bertgpt_jax.batches.examples import Batch
from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.packing import PackedPairs
from bertgpt_jax.batches.pairs import SentencePairs
from bertgpt_jax.config import Config, build
from bertgpt_jax.corpus.builder import open_corpus
from bertgpt_jax.corpus.config import CorpusConfig, HashSplit, WordPieceConfig
from bertgpt_jax.corpus.special import SPECIAL_TOKENS
from bertgpt_jax.models import bert, gpt
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.training.data import make_train
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant

RATE = 1e-4
STEPS = 10**6
"""More than are ever made."""
SENTENCE = 20
"""Words of a sentence."""


class Case(NamedTuple):
    """A model with its batch.

    Attributes:
        kind: gpt or bert; sizes: of the model, without its vocabulary.
        predictions: of a row, where tokens are masked.
        document: words of a document of its text, on average.
        packed: rows hold several sentence pairs.
        unit: what is counted: `tokens/s`, or `examples/s`, which are sentence pairs.
        least, stretch: what it is held to on one H200, and what would be more than that.
        apart: side by side, ours and a peer would not fit into the memory of one H200.
    """

    label: str
    kind: Literal["gpt", "bert"]
    sizes: dict[str, int]
    vocabulary: int
    length: int
    rows: int
    least: float
    stretch: float | None
    predictions: int = 0
    document: int = 2000
    packed: bool = False
    apart: bool = False

    @property
    def unit(self) -> str:
        """What its rate is given in."""
        return "tokens/s" if self.kind == "gpt" else "examples/s"


_GPT, _BERT = 50_257, 30_522
CASES = {
    "gpt2_xl": Case("GPT-2 1.5B", "gpt", gpt.SIZES["gpt2_xl"], _GPT, 1024, 16, 52e3, 56e3, apart=True),
    "gpt2": Case("GPT-2 124M", "gpt", gpt.SIZES["gpt2"], _GPT, 1024, 64, 500e3, 560e3),
    "bert_base": Case("BERT-base", "bert", bert.SIZES["base"], _BERT, 128, 512, 5500, 6500, 20),
    "bert_large": Case("BERT-large", "bert", bert.SIZES["large"], _BERT, 128, 256, 1850, 2000, 20),
    "bert_large_512_packed": Case(
        "BERT-large packed", "bert", bert.SIZES["large"], _BERT, 512, 64, 840, 1000, 80, document=250, packed=True
    ),
    "gpt2_medium": Case("GPT-2 350M", "gpt", gpt.SIZES["gpt2_medium"], _GPT, 1024, 32, 190e3, 210e3),
    "bert_large_512": Case("BERT-large", "bert", bert.SIZES["large"], _BERT, 512, 64, 420, None, 80),
}
"""The largest first: what it leaves of jax's memory, all others fit into, and the rest is the peers'."""


class Trial(Config):
    """Other sizes than the published ones, to see on any machine that everything works; no bar then holds."""

    layers: int | None = Field(default=None, ge=1)
    hidden: int | None = Field(default=None, ge=8)
    heads: int | None = Field(default=None, ge=1)
    vocabulary: int | None = Field(default=None, ge=110)
    length: int | None = Field(default=None, ge=16)
    rows: int | None = Field(default=None, ge=1)

    @property
    def is_full(self) -> bool:
        """Whether nothing differs."""
        return all(value is None for value in self.model_dump().values())

    def of(self, case: Case) -> Case:
        """The case in these sizes."""
        hidden = self.hidden or case.sizes["hidden_size"]
        length = self.length or case.length
        return case._replace(
            sizes=dict(
                num_layers=self.layers or case.sizes["num_layers"], hidden_size=hidden,
                num_heads=self.heads or case.sizes["num_heads"], intermediate_size=4 * hidden,
            ),
            vocabulary=self.vocabulary or case.vocabulary, length=length, rows=self.rows or case.rows,
            predictions=min(case.predictions, length // 4), document=min(case.document, 2 * length),
        )  # fmt: skip


def run_config(case: Case, compute: ComputeConfig, corpus: CorpusConfig | None = None) -> RunConfig:
    """The run whose step is measured: AdamW with clipping, no dropout, a vocabulary padded to a multiple of 128.

    Args:
        corpus: None where no data are read.
    """
    sizes = case.sizes | dict(
        vocab_size=case.vocabulary, vocab_multiple=128, max_positions=case.length, hidden_dropout=0.0,
        attention_dropout=0.0,
    )  # fmt: skip
    pairs = PackedPairs() if case.packed else SentencePairs()
    masked = MaskedLMNSP(examples=pairs, masking=Masking(max_predictions=case.predictions or None))
    stage = StageConfig(
        steps=STEPS, sequence_length=case.length, batch_size=case.rows, optimizer=AdamW(), schedule=Constant(peak=RATE)
    )
    tree = dict(
        corpus=corpus or CorpusConfig(path="unused"),
        model=gpt.GptConfig(**sizes) if case.kind == "gpt" else bert.BertConfig(**sizes),
        objective=CausalLM() if case.kind == "gpt" else masked,
        stages=(stage,),
        execution=ExecutionConfig(compute=compute),
    )
    return build(RunConfig, tree, "benchmark")


# ---------------------------------------------------------------- text


def made_up_corpus(case: Case, words: int, directory: Path) -> CorpusConfig:
    """A text of about `words` words of the case's vocabulary, each a token, frequent and rare ones as in language.

    It is written where it is not there yet; the vocabulary lies beside it.
    """
    name = f"{case.vocabulary}-{case.document}"
    text, vocabulary = directory / f"{name}.txt", directory / f"{name}-vocab.txt"
    if not text.exists():
        spellings = [_word(i) for i in range(case.vocabulary - len(SPECIAL_TOKENS))]
        vocabulary.write_text("\n".join([*SPECIAL_TOKENS, *spellings]) + "\n")
        text.write_text("\n\n".join(_documents(spellings, words, case.document)))
    return CorpusConfig(
        path=str(text), format="text", sentences="line", held_out=HashSplit(fraction=0.0), workers=0,
        tokenizer=WordPieceConfig(vocab_size=case.vocabulary, path=str(vocabulary)),
    )  # fmt: skip


def _word(number: int) -> str:
    """Four letters: none begins another."""
    return "".join(chr(ord("a") + number // 26**k % 26) for k in range(4))


def _documents(spellings: list[str], words: int, length: int) -> list[str]:
    """Documents of half to one and a half times `length` words, word k with a frequency of about 1/k (Zipf)."""
    rng, found, made = np.random.default_rng(0), [], 0
    while made < words:
        size = int(rng.integers(length // 2, length + length // 2)) + 1
        ranks = len(spellings) ** rng.random(size) - 1
        chosen = [spellings[int(rank)] for rank in ranks]
        found.append("\n".join(" ".join(chosen[i : i + SENTENCE]) for i in range(0, size, SENTENCE)))
        made += size
    return found


def open_batches(config: RunConfig, directory: Path) -> Callable[[int], Batch]:
    """Batch n of a run, as it would read it."""
    corpus = open_corpus(config.corpus, directory, progress=False)
    data = make_train(config, 0, 0, corpus, directory)
    rows = np.arange(config.stages[0].batch_size)
    return lambda n: data.batch(n, rows)


def examples_of_a_row(case: Case, batches: Callable[[int], Batch]) -> float:
    """Sentence pairs of a row, on average; 1 where rows are not packed."""
    if not case.packed:
        return 1.0
    return float(np.mean([batches(n)["next_weights"].sum() / case.rows for n in range(4)]))
