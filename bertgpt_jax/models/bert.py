"""BERT (Devlin et al. 2019): a post-norm encoder with a pooler, a tied masked-LM head and a next-sentence head.

RoBERTa (Liu et al. 2019) is the same module without types and next sentence, with positions that start at 2.
"""

from __future__ import annotations

from typing import Annotated, Literal

import flax.linen as nn
import jax.numpy as jnp
from pydantic import Field

from bertgpt_jax.config import ADDED
from bertgpt_jax.models.flops import stack_flops
from bertgpt_jax.nn.blocks import BlockConfig, ComputeConfig, apply_layers, layer_stack
from bertgpt_jax.nn.layers import (
    Einsum,
    Embedding,
    activation,
    constrain,
    dropout,
    dropout_key,
    first_rows,
    hide_padding,
    rounded_up,
)
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.nn.pipeline import Pipeline
from bertgpt_jax.shapes import Array, Hidden, Params, Tokens


class BertConfig(BlockConfig):
    """A BERT. Defaults are BERT-base's (google-research/bert `modeling.py` BertConfig, layer_norm)."""

    kind: Literal["bert"] = "bert"
    vocab_size: int | None = Field(
        default=None, ge=1, description="rows of the token table; None: the tokenizer's size"
    )
    vocab_multiple: Annotated[int, ADDED] = Field(
        default=1,
        ge=1,
        description="the token table has a multiple of so many rows (128 suits TPUs and GPUs); those without a "
        "token are zero, never win and are left out of exports",
    )
    max_positions: int = Field(default=512, ge=1, description="sequence positions, the offset's rows not counted")
    position_offset: int = Field(
        default=0, ge=0, description="2 for RoBERTa: fairseq numbers positions from pad id + 1"
    )
    type_vocab_size: int = Field(default=2, ge=0, description="0 leaves out token types")
    next_sentence_head: bool = Field(default=True, description="pooler and next-sentence classifier")
    tied_head: Annotated[bool, ADDED] = Field(
        default=True, description="the masked-LM head multiplies by the token table, not by one of its own"
    )
    num_layers: int = Field(default=12, ge=1)
    hidden_size: int = Field(default=768, ge=1)
    num_heads: int = Field(default=12, ge=1)
    intermediate_size: int = Field(default=3072, ge=1)
    norm_position: Literal["post", "pre"] = "post"
    norm_eps: float = Field(default=1e-12, gt=0)
    activation: Literal["gelu", "gelu_tanh", "relu"] = Field(
        default="gelu", description="erf as released; google-research/bert computes gelu_tanh since 2019-02-07"
    )
    hidden_dropout: float = Field(default=0.1, ge=0, lt=1)
    attention_dropout: float = Field(default=0.1, ge=0, lt=1)
    initializer: Literal["normal", "truncated_normal"] = "truncated_normal"
    initializer_range: float = Field(default=0.02, gt=0)
    residual_initializer: Literal["same", "depth_scaled"] = "same"

    @property
    def vocab_rows(self) -> int:
        """Rows of the token table, those without a token included; `vocab_size` must be known."""
        return rounded_up(self.vocab_size, self.vocab_multiple)

    def flops_per_token(self, sequence_length: int, scored: float = 1.0, *, halved: bool = False) -> float:
        """Training FLOPs an input token.

        Args:
            scored: share of positions that reach the masked-LM head (predictions / sequence length).
            halved: has no effect; an encoder attends both ways, so both conventions agree.
        """
        head = 6.0 * (self.hidden_size**2 + self.hidden_size * (self.vocab_size or 0)) * scored
        return stack_flops(self, sequence_length, halved=False) + head


SIZES = {
    "tiny": dict(num_layers=2, hidden_size=128, num_heads=2, intermediate_size=512),
    "mini": dict(num_layers=4, hidden_size=256, num_heads=4, intermediate_size=1024),
    "base": dict(num_layers=12, hidden_size=768, num_heads=12, intermediate_size=3072),
    "large": dict(num_layers=24, hidden_size=1024, num_heads=16, intermediate_size=4096),
}
"""Published sizes: base 110M and large 340M (paper section 3), tiny and mini from Turc et al. 2019."""


class Bert(nn.Module):
    """Bidirectional encoder with its pretraining heads.

    Attributes:
        config: sizes, with `vocab_size` resolved.
        compute: dtype, attention path, recomputation.
        pipeline: the stages that the layers are spread over; None: all layers in one place.
    """

    config: BertConfig
    compute: ComputeConfig
    pipeline: Pipeline | None = None

    def setup(self) -> None:
        c = self.config
        d, init, rows = c.hidden_size, c.weight_init(), c.max_positions + c.position_offset
        words = c.vocab_rows, d, ("vocab", "embed"), first_rows(init, c.vocab_size)
        self.token_embedding = Embedding(*words)
        self.position_embedding = Embedding(rows, d, ("positions", "embed"), init)
        if c.type_vocab_size:
            self.type_embedding = Embedding(c.type_vocab_size, d, ("types", "embed"), init)
        self.embedding_norm = c.make_norm()
        self.layers = layer_stack(c, self.compute)
        self.masked_transform = Einsum("BPD,DE->BPE", (d, d), ("embed", "act_embed"), init)
        self.masked_norm = c.make_norm()
        self.masked_bias = self.param(
            "masked_bias", nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",)), (c.vocab_rows,), jnp.float32
        )
        if not c.tied_head:
            self.masked_output = Embedding(*words)
        if c.next_sentence_head:
            self.pooler = Einsum("BD,DE->BE", (d, d), ("embed", "act_embed"), init)
            self.next_sentence = Einsum("BD,DC->BC", (d, 2), ("embed", "classes"), init)

    def embed(self, tokens_BT: Tokens, positions_BT: Tokens, types_BT: Tokens | None) -> Hidden:
        """What the layers read, in the compute dtype; `positions_BT` count from 0, whatever the table's offset."""
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        x_BTD = self.token_embedding(tokens_BT, dtype)
        x_BTD = x_BTD + self.position_embedding(positions_BT + c.position_offset, dtype)
        if c.type_vocab_size:
            types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
            x_BTD = x_BTD + self.type_embedding(types_BT, dtype)
        x_BTD = dropout(self.embedding_norm(x_BTD), c.hidden_dropout, dropout_key(self))
        return constrain(x_BTD, "rows", "length", "act_embed")

    def encode(self, tokens_BT: Tokens, positions_BT: Tokens, types_BT: Tokens | None, mask: AttentionMask) -> Hidden:
        """Final hidden states in the compute dtype."""
        x_BTD = self.embed(tokens_BT, positions_BT, types_BT)
        return apply_layers(self.layers, self.config, self.compute, self.pipeline, x_BTD, mask)

    def masked_hidden(self, x_BTD: Hidden, mask_positions_BP: Array) -> Array:
        """What the vocabulary head reads [B, P, D], of the given positions only: its cost is per prediction."""
        x_BPD = jnp.take_along_axis(x_BTD, mask_positions_BP[..., None], axis=1)
        x_BPD = constrain(x_BPD, "rows", "predictions", "act_embed")
        x_BPD = activation(self.config.activation)(self.masked_transform(x_BPD))
        return self.masked_norm(x_BPD)

    def logits(self, x_BPD: Array) -> Array:
        """Vocabulary logits [B, P, V] of what `masked_hidden` gives."""
        output = self.token_embedding if self.config.tied_head else self.masked_output
        logits_BPV = output.attend(x_BPD) + self.masked_bias.astype(x_BPD.dtype)
        logits_BPV = hide_padding(logits_BPV, self.config.vocab_size)
        return constrain(logits_BPV, "rows", "predictions", "act_vocab")

    def masked_logits(self, x_BTD: Hidden, mask_positions_BP: Array) -> Array:
        """Vocabulary logits [B, P, V] of final hidden states at the given positions."""
        return self.logits(self.masked_hidden(x_BTD, mask_positions_BP))

    def head_weights(self, params: Params) -> tuple[Array, Array]:
        """The vocabulary head's table [V, D] and bias [V] in `params`."""
        table = params["token_embedding" if self.config.tied_head else "masked_output"]["table"]
        return table, params["masked_bias"]

    def next_sentence_logits(self, x_BTD: Hidden, cls_positions_BK: Array | None = None) -> Array:
        """Is-next and is-random (BERT's label order) from tanh-pooled tokens: [B, 2] of the first one of each row.

        With `cls_positions_BK`, where the pairs of packed rows begin, [B, K, 2] of those.
        """
        if cls_positions_BK is None:
            return self.next_sentence(jnp.tanh(self.pooler(x_BTD[:, 0])))
        x_BKD = jnp.take_along_axis(x_BTD, cls_positions_BK[..., None], axis=1)
        pairs = constrain(x_BKD, "rows", None, "act_embed").reshape(-1, x_BTD.shape[-1])
        return self.next_sentence(jnp.tanh(self.pooler(pairs))).reshape(*cls_positions_BK.shape, 2)

    def __call__(
        self,
        tokens_BT: Tokens,
        positions_BT: Tokens,
        types_BT: Tokens | None,
        mask: AttentionMask,
        mask_positions_BP: Array,
        cls_positions_BK: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """(masked-LM logits [B, P, V], next-sentence logits or None without that head), compute dtype.

        Next-sentence logits are [B, 2], or [B, K, 2] of packed pairs.
        """
        inputs = tokens_BT, positions_BT, types_BT, mask, mask_positions_BP, cls_positions_BK
        x_BPD, following = self.head_inputs(*inputs)
        return self.logits(x_BPD), following

    def head_inputs(
        self,
        tokens_BT: Tokens,
        positions_BT: Tokens,
        types_BT: Tokens | None,
        mask: AttentionMask,
        mask_positions_BP: Array,
        cls_positions_BK: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """`__call__` before the vocabulary head: (what it reads [B, P, D], next-sentence logits or None)."""
        x_BTD = self.encode(tokens_BT, positions_BT, types_BT, mask)
        following = self.next_sentence_logits(x_BTD, cls_positions_BK) if self.config.next_sentence_head else None
        return self.masked_hidden(x_BTD, mask_positions_BP), following
