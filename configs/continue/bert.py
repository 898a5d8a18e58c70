"""Continued pretraining of a BERT or RoBERTa on the text of a domain; sizes and tokenizer come from the model.

Paper:    Gururangan et al. 2020, "Don't Stop Pretraining" (RoBERTa, 12,500 steps of batch 2,048; here a single device)
Command:  python tools/train.py configs/continue/bert.py init_from=bert-base corpus.path='texts/*' --workdir runs/mine
Hardware: one GPU for a base model; 2 CPU cores for a tiny one
Hours:    not measured
Expect:   a table of held-out losses on the domain and on Python's documentation, before and after, and an export for
          transformers in WORKDIR/export/final. Models without a next-sentence head: objective.kind=masked_lm
"""

from bertgpt_jax.corpus.config import CorpusConfig, HashSplit
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import ExecutionConfig, ExportConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Linear


def get_config() -> RunConfig:
    """One pass of 2,000 updates at a rate below pretraining's; the model's sizes here are placeholders."""
    return RunConfig(
        corpus=CorpusConfig(held_out=HashSplit(fraction=0.05)),
        model=BertConfig(),
        objective=MaskedLMNSP(),
        stages=(
            StageConfig(
                name="continue",
                steps=2_000,
                sequence_length=128,
                batch_size=32,
                optimizer=AdamW(weight_decay=0.01),
                schedule=Linear(peak=5e-5, warmup_steps=100),
            ),
        ),
        execution=ExecutionConfig(
            log_every=50,
            eval_every=500,
            save_every=500,
            general_text="stdlib",
            export=ExportConfig(at_end=True),
        ),
    )
