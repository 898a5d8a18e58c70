"""BERT-base on packed rows: several sentence pairs a row, each attending to itself alone, so that little is padding.

Paper:    Devlin et al. 2019; packing: Krell et al. 2021, "Efficient sequence packing without cross-contamination"
Command:  python tools/train.py configs/bert/base_packed.py corpus.path='wiki/*.gz' --workdir runs/bert-base-packed
Hardware: any mesh; bert/base names the paper's
Hours:    not measured; a step costs what one of bert/base costs, and an epoch takes fewer steps
Expect:   the pairs and masks of bert/base, more of them in a batch: on the enwiki-66M sample, mostly short documents,
          99% of the slots hold a token at 512, where bert/base fills 42%. A recipe of its own, not the paper's
"""

from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.packing import PackedPairs
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
    """Both phases of bert/base, rows filled with pairs."""
    optimizer = BertAdam(weight_decay=0.01, clip_norm=1.0)
    curve = dict(peak=1e-4, warmup_steps=10_000, total_steps=STEPS)
    return RunConfig(
        corpus=CorpusConfig(tokenizer=WordPieceConfig(vocab_size=30_522)),
        model=BertConfig(**SIZES["base"], vocab_multiple=128),
        objective=MaskedLMNSP(examples=PackedPairs(), masking=Masking(random_from="all")),
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
