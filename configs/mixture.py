"""A small GPT-2 on a mixture of two corpora, Python's documentation and its source code; nothing to download.

Paper:    Brown et al. 2020, section 2.2 (a corpus counts by its weight, not by its size); Radford et al. 2019 (model)
Command:  python tools/train.py configs/mixture.py --workdir runs/mixture
Hardware: 2 CPU cores
Time:     not measured alone; the model and steps of quickstart_gpt, over a text of eight times its size
Expect:   held-out loss 5.14, 1.94 bits per byte; of the documentation 5.34, of the code 5.08 (those of Python 3.11)
"""

import sysconfig
from pathlib import Path

from bertgpt_jax.corpus.config import ByteBPEConfig, CorpusConfig, HashSplit
from bertgpt_jax.corpus.mixture import MixtureConfig, MixturePart, WeightsFrom
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Cosine


def get_config() -> RunConfig:
    """Documentation and code 80 to 20, from step 401 on half and half; the tokenizer is the documentation's."""
    held_out = HashSplit(fraction=0.05)
    code = str(Path(sysconfig.get_path("stdlib")) / "*.py")
    return RunConfig(
        corpus=MixtureConfig(
            parts=(
                MixturePart(
                    name="docs", corpus=CorpusConfig(path="stdlib", held_out=held_out, sentences="none"), weight=0.8
                ),
                MixturePart(
                    name="code",
                    corpus=CorpusConfig(path=code, format="file", held_out=held_out, sentences="none"),
                    weight=0.2,
                ),
            ),
            tokenizer=ByteBPEConfig(vocab_size=8192),
            schedule=(WeightsFrom(from_step=401, weights=(0.5, 0.5)),),
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
