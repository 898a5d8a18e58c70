"""BERT-base as published: 90% of the steps at 128 tokens, 10% at 512, one learning-rate curve over both.

Paper:    Devlin et al. 2019, section 3 and appendix A.2; google-research/bert run_pretraining.py, optimization.py
Command:  python tools/train.py configs/bert/base.py corpus.path='wiki/*.gz' --workdir runs/bert-base
Hardware: 16 TPU v2 chips in the paper; any mesh here
Hours:    96 (paper)
Expect:   MNLI 84.6 after fine-tuning (paper, table 1); not reproduced by this project
"""

from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.pairs import SentencePairs
from bertgpt_jax.corpus.config import CorpusConfig, WordPieceConfig
from bertgpt_jax.models.bert import SIZES, BertConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.training.optim import BertAdam
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import BertLinear

STEPS = 1_000_000
PHASE1 = STEPS * 9 // 10


def get_config() -> RunConfig:
    """Both phases."""
    optimizer = BertAdam(weight_decay=0.01, clip_norm=1.0)
    curve = dict(peak=1e-4, warmup_steps=10_000, total_steps=STEPS)
    return RunConfig(
        corpus=CorpusConfig(tokenizer=WordPieceConfig(vocab_size=30_522)),
        model=BertConfig(**SIZES["base"], vocab_multiple=128),
        # Predictions: 15% of the length, 20 at 128 and 77 at 512, the width that the released models allow.
        objective=MaskedLMNSP(examples=SentencePairs(), masking=Masking(random_from="all")),
        stages=(
            StageConfig(
                name="phase1",
                steps=PHASE1,
                sequence_length=128,
                batch_size=256,
                optimizer=optimizer,
                schedule=BertLinear(**curve),
            ),
            StageConfig(
                name="phase2",
                steps=STEPS - PHASE1,
                sequence_length=512,
                batch_size=256,
                optimizer=optimizer,
                schedule=BertLinear(**curve, offset=PHASE1),
            ),
        ),
        execution=ExecutionConfig(
            compute=ComputeConfig(dtype="bfloat16"), log_every=100, eval_every=10_000, save_every=10_000
        ),
    )
