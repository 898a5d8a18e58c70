"""GPT-2 small (124M parameters) with nanoGPT's settings (OpenAI published the architecture, not the training).

Paper:    Radford et al. 2019; karpathy/nanoGPT config/train_gpt2.py (0.5M tokens a batch, 600k steps)
Command:  python tools/train.py configs/gpt/gpt2.py corpus.path='text/*.jsonl.gz' --workdir runs/gpt2
Hardware: 8 x A100 in nanoGPT
Hours:    96 (nanoGPT)
Expect:   held-out loss about 2.85 on OpenWebText (nanoGPT); not reproduced by this project
"""

from bertgpt_jax.corpus.config import ByteBPEConfig, CorpusConfig
from bertgpt_jax.models.gpt import SIZES, GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Cosine


def get_config() -> RunConfig:
    """One stage at 1,024 tokens; set corpus.tokenizer.path to a folder with GPT-2's files to use its vocabulary."""
    return RunConfig(
        corpus=CorpusConfig(sentences="none", tokenizer=ByteBPEConfig(vocab_size=50_257)),
        model=GptConfig(**SIZES["gpt2"], vocab_multiple=128, hidden_dropout=0.0, attention_dropout=0.0),
        objective=CausalLM(),
        stages=(
            StageConfig(
                steps=600_000,
                sequence_length=1024,
                batch_size=480,
                microbatches=1,
                optimizer=AdamW(b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0),
                schedule=Cosine(peak=6e-4, warmup_steps=2_000, final_fraction=0.1),
            ),
        ),
        execution=ExecutionConfig(
            compute=ComputeConfig(dtype="bfloat16"), log_every=100, eval_every=5_000, eval_batches=100, save_every=2_500
        ),
    )
