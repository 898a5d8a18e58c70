"""A BERT of two layers in two stages, dropout on, small enough that a run takes seconds; `corpus.path=` is a text file.

Steps and intervals are chosen so that evaluations, saves, rows and the stage boundary fall on different steps.
"""

from bertgpt_jax.corpus.config import CorpusConfig, HashSplit, WordPieceConfig
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Linear

BOUNDARY, STEPS = 12, 20
"""The step at which the second stage begins, and the last."""


def get_config() -> RunConfig:
    """20 steps: 12 of 16 tokens, 8 of 32; evaluation every 5, a checkpoint every 4, a row every 2."""
    optimizer = AdamW(weight_decay=0.01)
    return RunConfig(
        corpus=CorpusConfig(
            sentences="line", held_out=HashSplit(fraction=0.1), tokenizer=WordPieceConfig(vocab_size=256), workers=0
        ),
        model=BertConfig(num_layers=2, hidden_size=32, num_heads=4, intermediate_size=64, max_positions=32),
        objective=MaskedLMNSP(),
        stages=(
            StageConfig(
                name="short",
                steps=BOUNDARY,
                sequence_length=16,
                batch_size=8,
                optimizer=optimizer,
                schedule=Linear(peak=1e-2, warmup_steps=3, total_steps=40),
            ),
            StageConfig(
                name="long",
                steps=STEPS - BOUNDARY,
                sequence_length=32,
                batch_size=8,
                optimizer=optimizer,
                schedule=Linear(peak=1e-2, warmup_steps=3, total_steps=40, offset=BOUNDARY),
            ),
        ),
        execution=ExecutionConfig(
            compute=ComputeConfig(unroll_layers=False), log_every=2, eval_every=5, eval_batches=3, save_every=4
        ),
    )
