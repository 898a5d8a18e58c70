"""The Transformer block, post- or pre-norm, and the stack that scans or unrolls it over stacked parameters."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from bertgpt_jax.config import Config
from bertgpt_jax.nn.attention import KeyValues, dot_product_attention
from bertgpt_jax.nn.layers import Einsum, Initializer, LayerNorm, activation, constrain, dropout, dropout_key
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.shapes import Array, Hidden, Params


class BlockConfig(Config):
    """Sizes and rules of a stack of blocks; the model families derive theirs from it."""

    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    norm_position: Literal["post", "pre"]
    norm_eps: float = Field(gt=0)
    activation: Literal["gelu", "gelu_tanh", "relu"]
    hidden_dropout: float = Field(ge=0, lt=1)
    attention_dropout: float = Field(ge=0, lt=1)
    initializer: Literal["normal", "truncated_normal"]
    initializer_range: float = Field(gt=0, description="standard deviation of weights before truncation")
    residual_initializer: Literal["same", "depth_scaled"] = Field(
        description="depth_scaled divides by sqrt(2 num_layers) where a sub-layer is added to the residual stream"
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> BlockConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        return self

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    def weight_init(self, *, residual: bool = False) -> Initializer:
        """Initializer of a weight; `residual` for the projections that end a sub-layer."""
        std = self.initializer_range
        if residual and self.residual_initializer == "depth_scaled":
            std = std / (2 * self.num_layers) ** 0.5
        if self.initializer == "normal":
            return nn.initializers.normal(std)
        return nn.initializers.truncated_normal(std)  # cut at two standard deviations, as TensorFlow's


class ComputeConfig(Config):
    """How a model is computed; nothing here changes what is trained beyond rounding."""

    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of activations and matmuls; parameters, norms, softmax and loss stay fp32"
    )
    attention: Literal["auto", "reference"] = "auto"
    remat: Literal["none", "dots", "full"] = Field(
        default="none", description="what the backward pass recomputes: nothing, all but matmul results, everything"
    )
    unroll_layers: bool | None = Field(
        default=None, description="one loop body a layer instead of a scan: None unrolls everywhere but on TPU"
    )

    def unrolled(self) -> bool:
        """Whether the layer stack is unrolled on this platform (performance: scanning saves compile time on TPU)."""
        return jax.default_backend() != "tpu" if self.unroll_layers is None else self.unroll_layers


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2) with biases, q/k/v as separate kernels.

    Decoding gives what earlier tokens left, `cache`, and the slot to write at (see `KeyValues.extended`); the queries
    then see all slots that `mask` allows, their own among them.
    """

    config: BlockConfig

    @nn.compact
    def __call__(
        self, x_BTD: Hidden, mask: AttentionMask, cache: KeyValues | None = None, slot: Array | None = None
    ) -> tuple[Hidden, KeyValues | None]:
        c = self.config
        shape, axes = (c.hidden_size, c.num_heads, c.head_size), ("embed", "heads", "head_dim")

        def project(name: str) -> jax.Array:
            y_BTNH = Einsum("BTD,DNH->BTNH", shape, axes, c.weight_init(), name=name)(x_BTD)
            return constrain(y_BTNH, "batch", "length", "act_heads", None)

        with jax.named_scope("attention"):
            q_BTNH, k_BSNH, v_BSNH = project("query"), project("key"), project("value")
            if cache is not None:
                cache = cache.extended(k_BSNH, v_BSNH, slot)
                k_BSNH, v_BSNH = (x_BNSH.swapaxes(1, 2) for x_BNSH in cache)
            o_BTNH = dot_product_attention(q_BTNH, k_BSNH, v_BSNH, mask, c.attention_dropout, dropout_key(self))
            shape, axes = (c.num_heads, c.head_size, c.hidden_size), ("heads", "head_dim", "embed")
            return Einsum("BTNH,NHD->BTD", shape, axes, c.weight_init(residual=True), name="output")(o_BTNH), cache


class FeedForward(nn.Module):
    """Two linear maps with a nonlinearity between (Vaswani et al. 2017, eq. 2)."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD: Hidden) -> Hidden:
        c = self.config
        d, f = c.hidden_size, c.intermediate_size
        with jax.named_scope("feed_forward"):
            h_BTF = Einsum("BTD,DF->BTF", (d, f), ("embed", "mlp"), c.weight_init(), name="up")(x_BTD)
            h_BTF = activation(c.activation)(constrain(h_BTF, "batch", "length", "act_mlp"))
            init = c.weight_init(residual=True)
            return Einsum("BTF,FD->BTD", (f, d), ("mlp", "embed"), init, name="down")(h_BTF)


class Block(nn.Module):
    """Attention and feed-forward, each with dropout, residual and norm: after the sum (post) or before it (pre)."""

    config: BlockConfig

    @nn.compact
    def __call__(
        self, x_BTD: Hidden, mask: AttentionMask, cache: KeyValues | None = None, slot: Array | None = None
    ) -> tuple[Hidden, KeyValues | None]:
        c = self.config
        attention, feed_forward = Attention(c, name="attention"), FeedForward(c, name="feed_forward")
        attention_norm = LayerNorm(c.hidden_size, c.norm_eps, name="attention_norm")
        feed_forward_norm = LayerNorm(c.hidden_size, c.norm_eps, name="feed_forward_norm")

        def residual(x: Hidden, y: Hidden) -> Hidden:
            return constrain(x + dropout(y, c.hidden_dropout, dropout_key(self)), "batch", "length", "act_embed")

        if c.norm_position == "pre":
            y_BTD, cache = attention(attention_norm(x_BTD), mask, cache, slot)
            x_BTD = residual(x_BTD, y_BTD)
            return residual(x_BTD, feed_forward(feed_forward_norm(x_BTD))), cache
        y_BTD, cache = attention(x_BTD, mask, cache, slot)
        x_BTD = attention_norm(residual(x_BTD, y_BTD))
        return feed_forward_norm(residual(x_BTD, feed_forward(x_BTD))), cache


def layer_stack(config: BlockConfig, compute: ComputeConfig) -> nn.Module:
    """`num_layers` blocks as one module, (x_BTD, mask) -> (x_BTD, None); parameters stacked on a leading `layers` axis.

    Scanned or unrolled, and whatever is recomputed, the parameters and the function are the same.
    """
    block = Block
    if compute.remat != "none":
        policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
        block = nn.remat(Block, prevent_cse=compute.unrolled(), policy=policies[compute.remat])
    scan = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=config.num_layers,
        unroll=config.num_layers if compute.unrolled() else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scan(config)


def unstack(stacked: Params) -> tuple[Params, ...]:
    """One parameter tree a layer from the stacked tree of a `layer_stack` (`params["layers"]`).

    Each is what `Block(config).apply({"params": tree}, x, mask)` takes. Decoding reads them: slicing a stacked array in
    every step costs a copy of every weight.
    """
    length = jax.tree.leaves(stacked)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(length))


def stack(layers: tuple[Params, ...]) -> Params:
    """The inverse of `unstack`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
