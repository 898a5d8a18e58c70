"""A small BERT pretrained in two stages on Python's own documentation: the first thing to run, nothing to download.

Paper:    Devlin et al. 2019 (masked words and next sentences; 64 tokens first, then 128)
Command:  python tools/train.py configs/quickstart.py --workdir runs/quickstart
Hardware: 2 CPU cores
Time:     about 2 minutes, preparing the text included
Expect:   held-out masked-LM loss 5.93, where the unigram distribution's is 6.29
"""

from bertgpt_jax.corpus.config import CorpusConfig, HashSplit, WordPieceConfig
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Linear


def get_config() -> RunConfig:
    """The quickstart run."""
    optimizer = AdamW(weight_decay=0.01)
    return RunConfig(
        corpus=CorpusConfig(
            path="stdlib", held_out=HashSplit(fraction=0.05), tokenizer=WordPieceConfig(vocab_size=8192)
        ),
        model=BertConfig(
            num_layers=2,
            hidden_size=128,
            num_heads=2,
            intermediate_size=512,
            max_positions=128,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        objective=MaskedLMNSP(),
        stages=(
            StageConfig(
                name="phase1",
                steps=450,
                sequence_length=64,
                batch_size=32,
                optimizer=optimizer,
                schedule=Linear(peak=2e-3, warmup_steps=50, total_steps=500),
            ),
            StageConfig(
                name="phase2",
                steps=50,
                sequence_length=128,
                batch_size=16,
                optimizer=optimizer,
                schedule=Linear(peak=2e-3, warmup_steps=50, total_steps=500, offset=450),
            ),
        ),
        execution=ExecutionConfig(log_every=20, eval_every=150, save_every=150),
    )
