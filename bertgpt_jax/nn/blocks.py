"""The Transformer block, post- or pre-norm, and the stack that scans or unrolls it over stacked parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field, model_validator

from bertgpt_jax.config import ADDED, Config
from bertgpt_jax.nn import sequence
from bertgpt_jax.nn.attention import REFERENCE, KeyValues, PathChoice, dot_product_attention
from bertgpt_jax.nn.layers import (
    Einsum,
    Initializer,
    LayerNorm,
    Matmul,
    RMSNorm,
    activation,
    constrain,
    dropout,
    dropout_key,
)
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.nn.pipeline import Pipeline, run_layers
from bertgpt_jax.shapes import Array, Hidden, Params


class BlockConfig(Config):
    """Sizes and rules of a stack of blocks; the model families derive theirs from it."""

    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    norm_position: Literal["post", "pre"]
    norm: Annotated[Literal["layer", "rms"], ADDED] = Field(
        default="layer", description="layer: mean and bias too (Ba et al. 2016); rms: scale alone (Zhang & Sennrich)"
    )
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

    def make_norm(self, name: str | None = None) -> nn.Module:
        """A norm of hidden states."""
        return (RMSNorm if self.norm == "rms" else LayerNorm)(self.hidden_size, self.norm_eps, name=name)

    def weight_init(self, *, residual: bool = False) -> Initializer:
        """Initializer of a weight; `residual` for the projections that end a sub-layer."""
        std = self.initializer_range
        if residual and self.residual_initializer == "depth_scaled":
            std = std / (2 * self.num_layers) ** 0.5
        if self.initializer == "normal":
            return nn.initializers.normal(std)
        return nn.initializers.truncated_normal(std)  # cut at two standard deviations, as TensorFlow's


BLOCK_INPUT = "block_input"
"""Name of the array that the remat policy `offload` keeps."""


class ComputeConfig(Config):
    """How a model is computed; nothing here changes what is trained beyond rounding."""

    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of activations and matmuls; parameters, norms, softmax and loss stay fp32"
    )
    matmul: Matmul = Field(
        default="same",
        description="products of the layers' linear maps: in dtype, or (fp8) of operands rounded to 8 bits, on GPUs "
        "that multiply those; for models from 10^9 parameters on, smaller ones get slower",
    )
    attention: Literal["auto", "reference", "splash", "cudnn", "tokamax"] = Field(
        default="auto",
        description="auto: the platform's fastest path that can serve (tokamax by name only); another one must serve",
    )
    context_attention: Literal["auto", "all_gather", "ring"] = Field(
        default="auto",
        description="where the mesh splits sequences: all devices gather a layer's keys and values, or these go round; "
        "auto: gathered where a kernel computes attention, else the ring where it can serve",
    )
    zigzag: bool | None = Field(
        default=None,
        description="causal sequences that the mesh splits lie so that all devices have the same work; null: yes",
    )
    remat: Literal["none", "gelu", "dots", "offload", "full"] = Field(
        default="none",
        description="what the backward pass recomputes: nothing, activation functions, all but matmul results, "
        "everything from each layer's input (offload: which waits in host memory), everything",
    )
    head_chunk: int | None = Field(
        default=None,
        ge=1,
        description="scored positions whose vocabulary logits exist at a time, with their gradients; it divides their "
        "number a row. null: all at once",
    )
    unroll_layers: bool | Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="one loop body a layer instead of a scan; a number: so many layers a body; "
        "null unrolls everywhere but on TPU, where scanning saves most of the compile time",
    )
    platform: Literal["cpu", "gpu", "tpu"] | None = Field(
        default=None, description="compiled for; null: the one jax runs on"
    )
    emulate: bool = Field(
        default=False,
        description="attention = splash and matmul = fp8 run on any platform, emulated: slowly, to see what they give",
    )

    def compiled_for(self) -> str:
        """cpu, gpu or tpu."""
        backend = self.platform or jax.default_backend()
        return "gpu" if backend in ("cuda", "rocm") else backend

    def attention_choice(self) -> PathChoice:
        """How attention is to be computed."""
        form, zigzag = self.context_attention, bool(self.zigzag)
        return PathChoice(self.attention, self.compiled_for(), form, zigzag, self.emulate)

    def layers_per_body(self, num_layers: int) -> int:
        """Layers of one body of the loop over layers."""
        unroll = self.compiled_for() != "tpu" if self.unroll_layers is None else self.unroll_layers
        return (num_layers if unroll else 1) if isinstance(unroll, bool) else min(unroll, num_layers)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2) with biases, q/k/v as separate kernels.

    Decoding gives what earlier tokens left, `cache`, and the slot to write at (see `KeyValues.extended`); the queries
    then see all slots that `mask` allows, their own among them.
    """

    config: BlockConfig
    choice: PathChoice = REFERENCE
    matmul: Matmul = "same"

    @nn.compact
    def __call__(
        self, x_BTD: Hidden, mask: AttentionMask, cache: KeyValues | None = None, slot: Array | None = None
    ) -> tuple[Hidden, KeyValues | None]:
        c = self.config
        shape, axes = (c.hidden_size, c.num_heads, c.head_size), ("embed", "heads", "head_dim")

        def project(name: str) -> jax.Array:
            y_BTNH = Einsum("BTD,DNH->BTNH", shape, axes, c.weight_init(), matmul=self.matmul, name=name)(x_BTD)
            return constrain(y_BTNH, "batch", "length", "act_heads", None)

        q_BTNH, k_BSNH, v_BSNH = project("query"), project("key"), project("value")
        if cache is not None:
            cache = cache.extended(k_BSNH, v_BSNH, slot)
            k_BSNH, v_BSNH = (x_BNSH.swapaxes(1, 2) for x_BNSH in cache)
        rate, key = c.attention_dropout, dropout_key(self)
        with jax.named_scope("dot_product_attention"):
            o_BTNH = dot_product_attention(q_BTNH, k_BSNH, v_BSNH, mask, rate, key, self.choice)
        shape, axes = (c.num_heads, c.head_size, c.hidden_size), ("heads", "head_dim", "embed")
        output = Einsum("BTNH,NHD->BTD", shape, axes, c.weight_init(residual=True), matmul=self.matmul, name="output")
        return output(o_BTNH), cache


class FeedForward(nn.Module):
    """Two linear maps with a nonlinearity between (Vaswani et al. 2017, eq. 2).

    Attributes:
        recompute_activation: in the backward pass, instead of keeping its result.
        prevent_cse: keeps the compiler from undoing that; not needed inside a loop.
    """

    config: BlockConfig
    recompute_activation: bool = False
    prevent_cse: bool = True
    matmul: Matmul = "same"

    @nn.compact
    def __call__(self, x_BTD: Hidden) -> Hidden:
        c = self.config
        d, f = c.hidden_size, c.intermediate_size
        up = Einsum("BTD,DF->BTF", (d, f), ("embed", "mlp"), c.weight_init(), matmul=self.matmul, name="up")
        h_BTF = constrain(up(x_BTD), "batch", "length", "act_mlp")
        # The activation belongs to the second map, so that recomputing both (the map's own product is not needed
        # again) leaves h_BTF alone in memory; as two functions, the activated array would be kept for the kernel.
        down = nn.remat(Einsum, prevent_cse=self.prevent_cse) if self.recompute_activation else Einsum
        init, before = c.weight_init(residual=True), activation(c.activation)
        shape, axes = (f, d), ("mlp", "embed")
        return down("BTF,FD->BTD", shape, axes, init, before=before, matmul=self.matmul, name="down")(h_BTF)


class Block(nn.Module):
    """Attention and feed-forward, each with dropout, residual and norm: after the sum (post) or before it (pre)."""

    config: BlockConfig
    choice: PathChoice = REFERENCE
    recompute_activation: bool = False
    prevent_cse: bool = True
    matmul: Matmul = "same"

    @nn.compact
    def __call__(
        self, x_BTD: Hidden, mask: AttentionMask, cache: KeyValues | None = None, slot: Array | None = None
    ) -> tuple[Hidden, KeyValues | None]:
        c = self.config
        x_BTD = checkpoint_name(x_BTD, BLOCK_INPUT)
        attention = Attention(c, self.choice, self.matmul, name="attention")
        feed_forward = FeedForward(c, self.recompute_activation, self.prevent_cse, self.matmul, name="feed_forward")
        attention_norm = c.make_norm("attention_norm")
        feed_forward_norm = c.make_norm("feed_forward_norm")

        def residual(x: Hidden, y: Hidden) -> Hidden:
            dropped = dropout(y, c.hidden_dropout, dropout_key(self), sequence.arranger(self.choice.zigzag))
            return constrain(x + dropped, "batch", "length", "act_embed")

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
    unroll = compute.layers_per_body(config.num_layers)
    block = _recomputed_block(compute, prevent_cse=unroll > 1)
    scan = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=config.num_layers,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    choice, recompute = compute.attention_choice(), compute.remat == "gelu"
    return scan(config, choice, recompute_activation=recompute, prevent_cse=unroll > 1, matmul=compute.matmul)


def _recomputed_block(compute: ComputeConfig, prevent_cse: bool) -> type[nn.Module]:
    """`Block`, of which the backward pass recomputes what `compute.remat` says."""
    if compute.remat in ("none", "gelu"):
        return Block
    return nn.remat(Block, prevent_cse=prevent_cse, policy=remat_policy(compute.remat))


def apply_layers(
    stack: nn.Module,
    config: BlockConfig,
    compute: ComputeConfig,
    pipeline: Pipeline | None,
    x_BTD: Hidden,
    mask: AttentionMask,
) -> Hidden:
    """What the layers make of x_BTD: by the `layer_stack` itself, or by a pipeline over its parameters."""
    if pipeline is None or stack.is_initializing():
        return stack(x_BTD, mask)[0]
    choice, recompute = compute.attention_choice(), compute.remat == "gelu"
    block = _recomputed_block(compute, prevent_cse=False)(
        config, choice, recompute_activation=recompute, prevent_cse=False, matmul=compute.matmul, parent=None
    )

    def second(block: nn.Module, x_BTD: Hidden, mask: AttentionMask) -> Hidden:
        # Linen's scan traces its body twice, and what is drawn is numbered on: the compiled program has the second's.
        block(x_BTD, mask)
        return block(x_BTD, mask)[0]

    def layer(params: Params, x_BTD: Hidden, mask: AttentionMask, stream: LazyRng | None) -> Hidden:
        if stream is None:
            return block.apply({"params": params}, x_BTD, mask)[0]
        return block.apply({"params": params}, x_BTD, mask, rngs={"dropout": stream}, method=second)

    return run_layers(stack, layer, pipeline, x_BTD, mask, compute.layers_per_body(config.num_layers))


def remat_policy(name: str) -> Callable | None:
    """What the backward pass of a recomputed block may keep, by its name in `ComputeConfig.remat`."""
    policies = jax.checkpoint_policies
    return {
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
        "full": None,
    }[name]


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
