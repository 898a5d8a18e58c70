"""A small GPT-2 pretrained on Python's own documentation, nothing to download.

Paper:    Radford et al. 2019 (architecture; the size is ours)
Command:  python tools/train.py configs/quickstart_gpt.py --workdir runs/quickstart_gpt
Hardware: 2 CPU cores
Time:     under 5 minutes, preparing the text included
Expect:   held-out loss 5.27, 1.91 bits per byte
"""

from bertgpt_jax.corpus.config import ByteBPEConfig, CorpusConfig, HashSplit
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Cosine


def get_config() -> RunConfig:
    """The quickstart run of a decoder."""
    return RunConfig(
        corpus=CorpusConfig(
            path="stdlib",
            held_out=HashSplit(fraction=0.05),
            sentences="none",
            tokenizer=ByteBPEConfig(vocab_size=8192),
        ),
        model=GptConfig(
            num_layers=4,
            hidden_size=128,
            num_heads=4,
            intermediate_size=512,
            max_positions=128,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        objective=CausalLM(),
        stages=(
            StageConfig(
                steps=800,
                sequence_length=128,
                batch_size=8,
                optimizer=AdamW(b2=0.95, weight_decay=0.1),
                schedule=Cosine(peak=3e-3, warmup_steps=80, final_fraction=0.1),
            ),
        ),
        execution=ExecutionConfig(log_every=20, eval_every=400, save_every=400),
    )
