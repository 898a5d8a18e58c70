"""BERT-large with LAMB and 64k batches on a TPU pod: NVIDIA's recipe, each phase in few parts.

Paper:    You et al. 2020; NVIDIA/DeepLearningExamples PyTorch/LanguageModeling/BERT scripts/run_pretraining.sh
Command:  python tools/train.py configs/bert/large_pod.py corpus.path='wiki/*.gz' --workdir runs/bert-large-pod
Hardware: 1,024 TPU v3 chips in You et al. (76 minutes); planned here for v5e:16x16 and v4:8x8x8
Plan:     v5e:16x16 fits: 13.4 of 15.75 GiB a chip (compiled), MFU 40%, 0.1 days predicted
Plan:     v4:8x8x8 fits: 11.2 of 30.75 GiB a chip (compiled), MFU 38%, 0.04 days predicted
Hours:    not published for this hardware
Expect:   final pretraining loss 1.24 to 1.26, SQuAD 1.1 F1 90.7 to 91.0 (original); not reproduced by this project
"""

from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.corpus.config import CorpusConfig, WordPieceConfig
from bertgpt_jax.models.bert import SIZES, BertConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.training.optim import Lamb
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import BertLinear


def get_config() -> RunConfig:
    """Both phases; moments carry over, each phase has its own curve of degree 0.5."""
    optimizer = Lamb(weight_decay=0.01, clip_norm=1.0)
    return RunConfig(
        seed=12439,
        corpus=CorpusConfig(tokenizer=WordPieceConfig(vocab_size=30_522)),
        model=BertConfig(**SIZES["large"], vocab_multiple=128),
        objective=MaskedLMNSP(masking=Masking(random_from="all")),
        stages=(
            StageConfig(
                name="phase1",
                steps=7_038,
                sequence_length=128,
                batch_size=65_536,
                microbatches=4,
                optimizer=optimizer,
                schedule=BertLinear(peak=6e-3, warmup_steps=2_001, power=0.5),  # 28.43% of 7,038
            ),
            StageConfig(
                name="phase2",
                steps=1_563,
                sequence_length=512,
                batch_size=32_768,
                microbatches=8,
                optimizer=optimizer,
                schedule=BertLinear(peak=4e-3, warmup_steps=200, power=0.5),  # 12.8% of 1,563
            ),
        ),
        execution=ExecutionConfig(
            compute=ComputeConfig(dtype="bfloat16", remat="dots"), eval_every=500, save_every=200
        ),
    )
