"""BERT-tiny (2 layers, width 128) on any text: for trying a corpus or a tokenizer before a larger run.

Paper:    Turc et al. 2019 (size); Devlin et al. 2019 (objective)
Command:  python tools/train.py configs/bert/tiny.py corpus.path=text.txt --workdir runs/bert-tiny
Hardware: 2 CPU cores
Hours:    0.2
Expect:   depends on the text; `tools/evaluate.py` prints the unigram loss to compare with
"""

from bertgpt_jax.corpus.config import CorpusConfig, WordPieceConfig
from bertgpt_jax.models.bert import SIZES, BertConfig
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Linear


def get_config() -> RunConfig:
    """One stage at 128 tokens."""
    return RunConfig(
        corpus=CorpusConfig(tokenizer=WordPieceConfig(vocab_size=8192)),
        model=BertConfig(**SIZES["tiny"]),
        objective=MaskedLMNSP(),
        stages=(
            StageConfig(
                steps=5_000,
                sequence_length=128,
                batch_size=32,
                optimizer=AdamW(),
                schedule=Linear(peak=1e-3, warmup_steps=500),
            ),
        ),
        execution=ExecutionConfig(log_every=50, eval_every=1_000, save_every=1_000),
    )
