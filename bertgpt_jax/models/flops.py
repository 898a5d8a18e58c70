"""Analytic floating-point operations of a Transformer training step (multiply-add = 2, backward = 2 x forward)."""

from __future__ import annotations

from bertgpt_jax.nn.blocks import BlockConfig


def stack_flops(config: BlockConfig, sequence_length: int, *, halved: bool) -> float:
    """Training FLOPs a token of the layer stack: 6 x its matmul weights + 12 x L x D x S for attention.

    Args:
        halved: counts half of the attention products, the half that a causal mask keeps; the older convention (PaLM,
            nanoGPT, MosaicML) counts all of them. Print both: they differ by 7% for GPT-2 124M at 1,024.
    """
    d, f = config.hidden_size, config.intermediate_size
    weights = config.num_layers * (4 * d * d + 2 * d * f)
    attention = 12 * config.num_layers * d * sequence_length
    return 6.0 * weights + (attention / 2 if halved else attention)
