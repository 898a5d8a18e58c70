"""GPT-2 (Radford et al. 2019): a pre-norm decoder with learned positions and a tied output head without bias.

GPT-1 (Radford et al. 2018) is the same module with `GPT1`: norms after the sums and none at the end.
"""

from __future__ import annotations

from typing import Annotated, Literal

import flax.linen as nn
import jax.numpy as jnp
from pydantic import Field

from bertgpt_jax.config import ADDED
from bertgpt_jax.models.flops import stack_flops
from bertgpt_jax.nn import sequence
from bertgpt_jax.nn.blocks import BlockConfig, ComputeConfig, apply_layers, layer_stack
from bertgpt_jax.nn.layers import (
    Embedding,
    constrain,
    dropout,
    dropout_key,
    first_rows,
    hide_padding,
    rounded_up,
)
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.nn.pipeline import Pipeline
from bertgpt_jax.shapes import Array, Hidden, Logits, Params, Tokens


class GptConfig(BlockConfig):
    """A GPT. Defaults are GPT-2 small's (openai/gpt-2 `src/model.py`, `hparams.json`)."""

    kind: Literal["gpt"] = "gpt"
    vocab_size: int | None = Field(
        default=None, ge=1, description="rows of the token table; None: the tokenizer's size"
    )
    vocab_multiple: Annotated[int, ADDED] = Field(
        default=1,
        ge=1,
        description="the token table has a multiple of so many rows (128 suits TPUs and GPUs); those without a "
        "token are zero, never win and are left out of exports",
    )
    max_positions: int = Field(default=1024, ge=1)
    num_layers: int = Field(default=12, ge=1)
    hidden_size: int = Field(default=768, ge=1)
    num_heads: int = Field(default=12, ge=1)
    intermediate_size: int = Field(default=3072, ge=1)
    norm_position: Literal["post", "pre"] = "pre"
    final_norm: Annotated[bool, ADDED] = Field(default=True, description="a norm between the last layer and the head")
    tied_head: Annotated[bool, ADDED] = Field(
        default=True, description="the head multiplies by the token table, not by one of its own"
    )
    norm_eps: float = Field(default=1e-5, gt=0)
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu_tanh"
    hidden_dropout: float = Field(default=0.1, ge=0, lt=1)
    attention_dropout: float = Field(default=0.1, ge=0, lt=1)
    initializer: Literal["normal", "truncated_normal"] = "normal"
    initializer_range: float = Field(default=0.02, gt=0)
    position_initializer_range: float = Field(default=0.01, gt=0, description="openai/gpt-2 src/model.py: wpe")
    residual_initializer: Literal["same", "depth_scaled"] = Field(
        default="depth_scaled", description="paper section 2.3; N counts both residual layers of a block (Megatron)"
    )

    @property
    def vocab_rows(self) -> int:
        """Rows of the token table, those without a token included; `vocab_size` must be known."""
        return rounded_up(self.vocab_size, self.vocab_multiple)

    def flops_per_token(self, sequence_length: int, scored: float = 1.0, *, halved: bool = True) -> float:
        """Training FLOPs a token.

        Args:
            scored: share of positions that reach the vocabulary head.
            halved: counts the half of attention that the causal mask keeps; see `stack_flops`.
        """
        head = 6.0 * self.hidden_size * (self.vocab_size or 0) * scored
        return stack_flops(self, sequence_length, halved=halved) + head


SIZES = {
    "gpt2": dict(num_layers=12, hidden_size=768, num_heads=12, intermediate_size=3072),
    "gpt2_medium": dict(num_layers=24, hidden_size=1024, num_heads=16, intermediate_size=4096),
    "gpt2_large": dict(num_layers=36, hidden_size=1280, num_heads=20, intermediate_size=5120),
    "gpt2_xl": dict(num_layers=48, hidden_size=1600, num_heads=25, intermediate_size=6400),
}
"""The released sizes: 124M, 355M, 774M and 1,558M parameters (paper table 2; the first is called 117M there)."""

GPT1 = dict(
    num_layers=12, hidden_size=768, num_heads=12, intermediate_size=3072, max_positions=512, norm_position="post",
    final_norm=False, position_initializer_range=0.02, residual_initializer="same",
)  # fmt: skip
"""GPT-1, 117M: its size, and how its layers differ from GPT-2's (openai/finetune-transformer-lm train.py)."""


class Gpt(nn.Module):
    """Decoder-only language model.

    Attributes:
        config: sizes, with `vocab_size` resolved.
        compute: dtype, attention path, recomputation.
        pipeline: the stages that the layers are spread over; None: all layers in one place.
    """

    config: GptConfig
    compute: ComputeConfig
    pipeline: Pipeline | None = None

    def setup(self) -> None:
        c = self.config
        init, position_init = c.weight_init(), nn.initializers.normal(c.position_initializer_range)
        words = c.vocab_rows, c.hidden_size, ("vocab", "embed"), first_rows(init, c.vocab_size)
        self.token_embedding = Embedding(*words)
        self.position_embedding = Embedding(c.max_positions, c.hidden_size, ("positions", "embed"), position_init)
        self.layers = layer_stack(c, self.compute)
        if c.final_norm:
            self.final_norm = c.make_norm()
        if not c.tied_head:
            self.output = Embedding(*words)

    def embed(self, tokens_BT: Tokens, positions_BT: Tokens) -> Hidden:
        """What the layers read, in the compute dtype."""
        dtype = jnp.dtype(self.compute.dtype)
        x_BTD = self.token_embedding(tokens_BT, dtype) + self.position_embedding(positions_BT, dtype)
        arrange = sequence.arranger(bool(self.compute.zigzag), "rows")
        x_BTD = dropout(x_BTD, self.config.hidden_dropout, dropout_key(self), arrange)
        return constrain(x_BTD, "rows", "length", "act_embed")

    def normalize(self, x_BTD: Hidden) -> Hidden:
        """The last layer's hidden states as the head reads them."""
        return self.final_norm(x_BTD) if self.config.final_norm else x_BTD

    def encode(self, tokens_BT: Tokens, positions_BT: Tokens, mask: AttentionMask) -> Hidden:
        """Final hidden states, after the last norm, in the compute dtype."""
        x_BTD = self.embed(tokens_BT, positions_BT)
        return self.normalize(apply_layers(self.layers, self.config, self.compute, self.pipeline, x_BTD, mask))

    def __call__(self, tokens_BT: Tokens, positions_BT: Tokens, mask: AttentionMask) -> Logits:
        """Next-token logits in the compute dtype."""
        return self.logits(self.encode(tokens_BT, positions_BT, mask))

    def head_weights(self, params: Params) -> tuple[Array, None]:
        """The head's table [V, D] in `params`, and its bias: none."""
        return params["token_embedding" if self.config.tied_head else "output"]["table"], None

    def logits(self, x_BTD: Hidden) -> Logits:
        """Vocabulary logits of normalised hidden states."""
        output = self.token_embedding if self.config.tied_head else self.output
        logits_BTV = hide_padding(output.attend(x_BTD), self.config.vocab_size)
        return constrain(logits_BTV, "rows", "length", "act_vocab")
