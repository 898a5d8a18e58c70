"""BERT-mini (4 layers, width 256) on a few million tokens: what two CPU cores can pretrain while one waits.

Paper:    Turc et al. 2019 (size); Devlin et al. 2019 (objective)
Command:  python tools/train.py configs/bert/mini.py corpus.path='["wiki/a.gz", "wiki/b.gz"]' --workdir runs/bert-mini
Hardware: 2 CPU cores
Hours:    0.7
Expect:   on 13 files of English Wikipedia held-out masked loss 6.53 (the unigram distribution's is 7.10)
"""

from bertgpt_jax.corpus.config import CorpusConfig, HashSplit, WordPieceConfig
from bertgpt_jax.models.bert import SIZES, BertConfig
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.training.optim import Muon
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Linear


def get_config() -> RunConfig:
    """One stage at 128 tokens, no dropout: the run sees its text a few times only."""
    return RunConfig(
        corpus=CorpusConfig(held_out=HashSplit(fraction=0.02), tokenizer=WordPieceConfig(vocab_size=8192)),
        model=BertConfig(**SIZES["mini"], max_positions=128, hidden_dropout=0.0, attention_dropout=0.0),
        objective=MaskedLMNSP(),
        stages=(
            StageConfig(
                steps=2_600,
                sequence_length=128,
                batch_size=16,
                optimizer=Muon(weight_decay=0.01),
                schedule=Linear(peak=3e-3, warmup_steps=60),
            ),
        ),
        execution=ExecutionConfig(log_every=20, eval_every=200, save_every=200),
    )
