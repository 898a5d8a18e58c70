"""Continued pretraining of a GPT-2 on the text of a domain; sizes and tokenizer come from the model.

Paper:    Radford et al. 2019 (the model); Gururangan et al. 2020 (domain-adaptive pretraining)
Command:  python tools/train.py configs/continue/gpt2.py init_from=gpt2 corpus.path='texts/*.txt' --workdir runs/mine
Hardware: one GPU for the small model; 2 CPU cores for a tiny one
Hours:    not measured
Expect:   a table of held-out losses on the domain and on Python's documentation, before and after, and an export for
          transformers in WORKDIR/export/final
"""

from bertgpt_jax.corpus.config import CorpusConfig, HashSplit
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import ExecutionConfig, ExportConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Cosine


def get_config() -> RunConfig:
    """One pass of 2,000 updates at a rate below pretraining's; the model's sizes here are placeholders."""
    return RunConfig(
        corpus=CorpusConfig(held_out=HashSplit(fraction=0.05), sentences="none"),
        model=GptConfig(),
        objective=CausalLM(),
        stages=(
            StageConfig(
                name="continue",
                steps=2_000,
                sequence_length=256,
                batch_size=16,
                optimizer=AdamW(b2=0.95, weight_decay=0.1),
                schedule=Cosine(peak=5e-5, warmup_steps=100),
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
