"""nanoGPT's CPU run: a character-level GPT on the works of Shakespeare.

Paper:    karpathy/nanoGPT README, "I only have a macbook": 4 layers, 4 heads, width 128, context 64, batch 12
Command:  python tools/train.py configs/gpt/shakespeare_char.py corpus.path=input.txt --workdir runs/shakespeare
Hardware: 2 CPU cores
Time:     about 2 minutes
Expect:   held-out loss at or below 1.88, nanoGPT's published value. Ours is over the whole held-out tenth in windows of
          64 that do not overlap; nanoGPT's over 20 random batches.
"""

from bertgpt_jax.corpus.config import CharactersConfig, CorpusConfig, PositionSplit
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Cosine


def get_config() -> RunConfig:
    """The shakespeare run; the text is the user's to bring."""
    return RunConfig(
        corpus=CorpusConfig(
            format="file",
            sentences="none",
            held_out=PositionSplit(fraction=0.1),
            shuffle_documents=False,
            tokenizer=CharactersConfig(),
        ),
        model=GptConfig(
            num_layers=4,
            hidden_size=128,
            num_heads=4,
            intermediate_size=512,
            max_positions=64,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            position_initializer_range=0.02,  # nanoGPT initialises both tables alike
        ),
        objective=CausalLM(),
        stages=(
            StageConfig(
                steps=2000,
                sequence_length=64,
                batch_size=12,
                # nanoGPT's config/train_shakespeare_char.py but for the rate: its 1e-3 to 1e-4 ends at 1.892 here
                optimizer=AdamW(b1=0.9, b2=0.99, weight_decay=0.1),
                schedule=Cosine(peak=4e-3, warmup_steps=100, final_fraction=0.02),
            ),
        ),
        execution=ExecutionConfig(log_every=100, eval_every=500, save_every=1000),
    )
