"""RoBERTa-base: dynamic masks over full sentences, no next-sentence prediction, byte-level BPE.

Paper:    Liu et al. 2019; facebookresearch/fairseq examples/roberta/config/pretraining/base.yaml (batch 2,048, 125k)
Command:  python tools/train.py configs/roberta/base.py corpus.path='text/*.gz' --workdir runs/roberta-base
Hardware: 8 x 32 GB V100 with 16 accumulation steps in the original
Hours:    not published for this setting
Expect:   MNLI 87.6 for the paper's longer run (table 8, base); not reproduced by this project
"""

from bertgpt_jax.batches.masking import ROBERTA
from bertgpt_jax.batches.sentences import FullSentences
from bertgpt_jax.corpus.config import ByteBPEConfig, CorpusConfig
from bertgpt_jax.models.bert import SIZES, BertConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.masked_lm import MaskedLM
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Linear


def get_config() -> RunConfig:
    """One stage at 512 tokens."""
    return RunConfig(
        corpus=CorpusConfig(tokenizer=ByteBPEConfig(vocab_size=50_265)),
        model=BertConfig(
            **SIZES["base"],
            vocab_multiple=128,
            norm_eps=1e-5,
            position_offset=2,
            type_vocab_size=0,
            next_sentence_head=False,
        ),
        objective=MaskedLM(examples=FullSentences(), masking=ROBERTA),
        stages=(
            StageConfig(
                steps=125_000,
                sequence_length=512,
                batch_size=2_048,
                microbatches=16,
                optimizer=AdamW(b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01, clip_norm=None),
                schedule=Linear(peak=5e-4, warmup_steps=10_000),
            ),
        ),
        execution=ExecutionConfig(
            compute=ComputeConfig(dtype="bfloat16"), log_every=100, eval_every=5_000, save_every=2_500
        ),
    )
