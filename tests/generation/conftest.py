"""Tiny models with random parameters, and a decoder that is a table."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.models import make_model
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GPT1, GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.masks import AttentionMask, causal_mask

SIZES = dict(num_layers=2, hidden_size=24, num_heads=3, intermediate_size=32)
V, CONTEXT = 19, 24
POST = {name: GPT1[name] for name in ("norm_position", "final_norm", "residual_initializer")}


class Tiny:
    """A model with random parameters.

    Attributes:
        config, model, params: stacked, on the host.
    """

    def __init__(self, config: GptConfig | BertConfig, spread: float = 0.4):
        self.config, self.model = config, make_model(config, ComputeConfig(unroll_layers=False))
        ids = jnp.zeros((1, 1), jnp.int32)
        inputs = (ids, ids, ids, AttentionMask(), ids) if config.kind == "bert" else (ids, ids, AttentionMask())
        shapes = nn.unbox(jax.eval_shape(lambda: self.model.init(jax.random.key(0), *inputs)))["params"]
        rng = np.random.default_rng(0)
        self.params = jax.tree.map(lambda x: (rng.standard_normal(x.shape) * spread).astype(np.float32), shapes)
        mask = causal_mask() if config.kind == "gpt" else AttentionMask()

        tree = {"params": jax.tree.map(jnp.asarray, self.params)}

        def forward(tokens_BT: jax.Array) -> jax.Array:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
            if config.kind == "gpt":
                return self.model.apply(tree, tokens_BT, positions_BT, mask)
            return self.model.apply(tree, tokens_BT, positions_BT, None, mask, positions_BT)[0]

        self._forward = jax.jit(forward, compiler_options={"xla_backend_optimization_level": 0})

    def forward(self, rows: Any) -> np.ndarray:
        """Logits [B, T, V] of rows of one length, without cache, padding or segments."""
        return np.asarray(self._forward(np.asarray(rows)))


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def gpt() -> Tiny:
    return Tiny(GptConfig(**SIZES, vocab_size=V, max_positions=CONTEXT))


@pytest.fixture(scope="session")
def gpt1() -> Tiny:
    """Post-norm, no final norm, and a head of its own."""
    return Tiny(GptConfig(**SIZES, **POST, vocab_size=V, max_positions=CONTEXT, tied_head=False))


@pytest.fixture(scope="session")
def bert() -> Tiny:
    """With a position offset, as RoBERTa's."""
    sizes = dict(vocab_size=V, max_positions=64, position_offset=2, next_sentence_head=False)
    return Tiny(BertConfig(**SIZES, **sizes))


@dataclasses.dataclass(frozen=True)
class TableDecoder:
    """log P of the next token is a row of `table` [V, V], chosen by the last token. Its cache: tokens read, by row."""

    vocab_size: int
    max_positions: int = 1000

    def prefill(self, table: Any, tokens_BT: Any, starts_B: Any, slots: int) -> tuple[Any, Any]:
        return table[tokens_BT[:, -1]], {
            "read": jnp.full(len(starts_B), tokens_BT.shape[1]) - starts_B,
            "steps": jnp.int32(0),
        }

    def step(self, table: Any, tokens_B: Any, cache: Any) -> tuple[Any, Any]:
        return table[tokens_B], {"read": cache["read"] + 1, "steps": cache["steps"] + 1}


@pytest.fixture(scope="session")
def table_decoder() -> type[TableDecoder]:
    return TableDecoder
