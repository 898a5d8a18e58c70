"""Decoding with a KV cache: `prefill` reads the prompts, `step` reads one more token of every row.

Parameters get a layout of their own: layers split once (slicing stacked arrays in every step would copy every weight)
and unrolled, each with its own cache. The mathematics is the training model's: the same blocks, embedding and head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bertgpt_jax.models import make_model
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.attention import KeyValues
from bertgpt_jax.nn.blocks import Block, ComputeConfig, unstack
from bertgpt_jax.nn.masks import AttentionMask, causal_mask
from bertgpt_jax.parallel import sharding
from bertgpt_jax.shapes import Array, Hidden, Params, PyTree, Tokens


class Decoder(Protocol):
    """A model that continues token sequences; what sampling and beam search are written for.

    A cache is a pytree whose arrays with dimensions have rows first, so that beams can be reordered.

    Attributes:
        vocab_size: logits are over these ids.
        max_positions: longest sequence a row can have, prompt included; the last token that is drawn needs no place.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    def prefill(self, params: PyTree, tokens_BT: Tokens, starts_B: Array, slots: int) -> tuple[Array, PyTree]:
        """(logits [B, V] of the next token, cache) of right-aligned prompts that begin at column `starts_B`.

        Args:
            slots: capacity of the cache in columns, T and the steps to come.
        """

    def step(self, params: PyTree, tokens_B: Array, cache: PyTree) -> tuple[Array, PyTree]:
        """(logits [B, V] of the next token, cache) after one more token a row."""


class Cache(NamedTuple):
    """What a Transformer decoder remembers.

    Attributes:
        layers: keys and values, a pair a layer.
        starts_B: first slot of each row that holds a token; what precedes is padding and never attended to.
        slot: int32 [], the next slot to write, the same in every row.
    """

    layers: tuple[KeyValues, ...]
    starts_B: Array
    slot: Array


@dataclasses.dataclass(frozen=True)
class GptDecoder:
    """A `models.gpt.Gpt`, GPT-2's or GPT-1's layers alike.

    Attributes:
        config: of the model.
        vocab_size: logits beyond are dropped: rows that pad the table, of which the tokenizer knows nothing.
        dtype: of activations, weights and cache.
        transposed_head: keeps a copy [D, V] of the output table; see `benchmarks/decode.py` for what it gives.
    """

    config: GptConfig
    vocab_size: int
    dtype: str = "float32"
    transposed_head: bool = False

    @property
    def max_positions(self) -> int:
        """Rows of the position table."""
        return self.config.max_positions

    def layout(self, params: Params, mesh: Mesh | None = None) -> PyTree:
        """Parameters as `prefill` and `step` read them, from the training layout (host or device arrays).

        Args:
            mesh: lays them on it as in training; call `prefill` and `step` inside its `mesh_context`.

        Raises:
            ConfigError: the mesh does not divide a dimension.
        """
        if mesh is not None:
            params = jax.device_put(params, sharding.parameter_shardings(self._abstract(), mesh))
        layers = unstack(params["layers"])  # first: slices of host arrays are views
        ends = jax.tree.map(self._weight, {name: tree for name, tree in params.items() if name != "layers"})
        laid = {"ends": ends, "layers": jax.tree.map(self._weight, layers)}
        if self.transposed_head:
            laid["head_DV"] = jnp.copy(ends["token_embedding" if self.config.tied_head else "output"]["table"].T)
        return laid

    def prefill(self, params: PyTree, tokens_BT: Tokens, starts_B: Array, slots: int) -> tuple[Array, Cache]:
        """See `Decoder`."""
        rows, length = tokens_BT.shape
        columns_T = jnp.arange(length)
        real_BT = (columns_T >= starts_B[:, None]).astype(jnp.int32)
        mask = causal_mask().replace(q_segments_BT=real_BT, kv_segments_BS=real_BT)
        none = jnp.zeros((rows, self.config.num_heads, 0, self.config.head_size), jnp.dtype(self.dtype))
        empty = (KeyValues(none, none),) * self.config.num_layers
        positions_BT = jnp.maximum(columns_T - starts_B[:, None], 0)
        logits_BV, layers = self._forward(params, tokens_BT, positions_BT, mask, empty, None)
        room = ((0, 0), (0, 0), (0, slots - length), (0, 0))
        layers = jax.tree.map(lambda x_BNSH: jnp.pad(x_BNSH, room), layers)
        return logits_BV, Cache(layers, starts_B, jnp.asarray(length, jnp.int32))

    def step(self, params: PyTree, tokens_B: Array, cache: Cache) -> tuple[Array, Cache]:
        """See `Decoder`."""
        slots_S = jnp.arange(cache.layers[0].k_BNSH.shape[2])[None]
        real_BS = (slots_S >= cache.starts_B[:, None]).astype(jnp.int32)
        mask = AttentionMask(
            causal=True,
            sees_itself=True,
            q_positions_BT=cache.slot[None, None],
            kv_positions_BS=slots_S,
            q_segments_BT=jnp.ones((1, 1), jnp.int32),
            kv_segments_BS=real_BS,
        )
        positions_BT = (cache.slot - cache.starts_B)[:, None]
        logits_BV, layers = self._forward(params, tokens_B[:, None], positions_BT, mask, cache.layers, cache.slot)
        return logits_BV, Cache(layers, cache.starts_B, cache.slot + 1)

    def _forward(
        self,
        params: PyTree,
        tokens_BT: Tokens,
        positions_BT: Tokens,
        mask: AttentionMask,
        caches: tuple[KeyValues, ...],
        slot: Array | None,
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        """(fp32 logits [B, V] of the last column, caches with the new tokens)."""
        model, block = self._model(), Block(self.config)
        x_BTD = model.apply({"params": params["ends"]}, tokens_BT, positions_BT, method="embed")
        extended = []
        for layer, cache in zip(params["layers"], caches, strict=True):
            x_BTD, cache = block.apply({"params": layer}, x_BTD, mask, cache, slot)
            extended.append(cache)
        x_BTD = model.apply({"params": params["ends"]}, x_BTD[:, -1:], method="normalize")
        return self._logits(params, x_BTD), tuple(extended)

    def _logits(self, params: PyTree, x_BTD: Hidden) -> Array:
        if self.transposed_head:
            logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, params["head_DV"])
        else:
            logits_BTV = self._model().apply({"params": params["ends"]}, x_BTD, method="logits")
        return logits_BTV[:, 0, : self.vocab_size].astype(jnp.float32)

    def _model(self) -> Any:
        return make_model(self.config, ComputeConfig(dtype=self.dtype))

    def _weight(self, leaf: Array) -> Array:
        """Matrices in the compute dtype, as every step reads them; vectors stay as they are (norms compute in fp32)."""
        return jnp.asarray(leaf, jnp.dtype(self.dtype) if leaf.ndim > 1 else None)

    def _abstract(self) -> PyTree:
        """Parameters with their logical axes, nothing allocated."""
        ids = jnp.zeros((1, 1), jnp.int32)
        return jax.eval_shape(lambda: self._model().init(jax.random.key(0), ids, ids, causal_mask()))["params"]
