"""GPT-3 6.7B: 32 layers of width 4,096, 32 heads of 128.

Every layer is dense; the paper alternates with locally banded sparse ones.

Paper:    Brown et al. 2020, table 2.1 and appendix B
Command:  python tools/train.py configs/gpt3/6_7b.py corpus.path='text/*.jsonl.gz' --workdir runs/gpt3-6-7b
Hardware: V100s on a cluster, not said how many; planned here for v6e:16x16
Plan:     v6e:16x16 fits: 21.7 of 31.25 GiB a chip (compiled), MFU 54%, 1.3 days predicted
Hours:    not published
Expect:   few-shot results of the paper's appendix H on its data; not reproduced by this project
"""

from bertgpt_jax.batches.ramp import Ramp, batch_ramp
from bertgpt_jax.corpus.config import ByteBPEConfig, CorpusConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.parallel.mesh import MeshConfig
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Cosine

LENGTH = 2048
RAMP = batch_ramp(((0, 16), (2e9, 256), (4e9, 512), (6e9, 768), (8e9, 1024)), LENGTH)


def steps(tokens: float) -> int:
    """Updates that so many tokens take along the ramp."""
    return Ramp(RAMP, ((0, LENGTH),)).batches_for(int(tokens), lambda length: length)


def get_config() -> RunConfig:
    """300 billion tokens: 375 million of warmup, a cosine to a tenth at 260 billion, then constant."""
    return RunConfig(
        corpus=CorpusConfig(sentences="none", tokenizer=ByteBPEConfig(vocab_size=50_257)),
        model=GptConfig(
            vocab_size=50_304,  # a multiple of 128, which meshes divide
            max_positions=LENGTH,
            num_layers=32,
            hidden_size=4096,
            num_heads=32,
            intermediate_size=16384,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        objective=CausalLM(),
        stages=(
            StageConfig(
                tokens=300_000_000_000,
                sequence_length=LENGTH,
                batch_size=1_024,
                batch_ramp=RAMP,
                microbatches=1,
                optimizer=AdamW(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0),
                schedule=Cosine(peak=1.2e-4, warmup_steps=steps(375e6), total_steps=steps(260e9), final_fraction=0.1),
            ),
        ),
        execution=ExecutionConfig(
            mesh=MeshConfig(data=1, fsdp=-1),
            compute=ComputeConfig(dtype="bfloat16", remat="dots"),
            log_every=100,
            eval_every=2_000,
            eval_batches=50,
            save_every=1_000,
        ),
    )
