"""Our own forward, layer by layer, from parameters that are read as they are needed."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bertgpt_jax.models import make_model
from bertgpt_jax.nn.blocks import Block, ComputeConfig
from bertgpt_jax.nn.losses import cross_entropy
from bertgpt_jax.nn.masks import causal_mask, segment_mask
from bertgpt_jax.shapes import Params
from bertgpt_jax.transfer.numpy_reference import IGNORED, Outputs
from bertgpt_jax.transfer.source import ModelConfig

COMPUTE = ComputeConfig(unroll_layers=False)


def forward(
    config: ModelConfig, top: Params, layer: Callable[[int], Params], batch: dict[str, np.ndarray], layers: int
) -> Outputs:
    """Runs the first `layers` layers, then the head, in fp32 without dropout.

    Args:
        top: the parameters outside the layers.
        layer: index -> the parameters of one layer.
        batch: see `numpy_reference.forward`.
    """
    model, encoder = make_model(config, COMPUTE), config.kind == "bert"
    tokens = jnp.asarray(batch["tokens"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    inputs = (tokens, positions, jnp.asarray(batch["types"])) if encoder else (tokens, positions)
    mask = segment_mask(jnp.asarray(batch["attention"])) if encoder else causal_mask()

    @jax.jit
    def embed(params: Params) -> jax.Array:
        return model.apply({"params": params}, *inputs, method="embed")

    @jax.jit
    def step(params: Params, x: jax.Array) -> jax.Array:
        return Block(config).apply({"params": params}, x, mask)[0]

    @jax.jit
    def head(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        if not encoder:
            x = model.apply({"params": params}, x, method="normalize")
            return x, model.apply({"params": params}, x, method="logits"), None
        logits = model.apply({"params": params}, x, positions, method="masked_logits")
        pairs = config.next_sentence_head
        return x, logits, model.apply({"params": params}, x, method="next_sentence_logits") if pairs else None

    with jax.default_matmul_precision("highest"):
        hidden = [embed(top)]
        for i in range(layers):
            hidden.append(step(layer(i), hidden[-1]))
        hidden[-1], logits, next_logits = head(top, hidden[-1])
    if encoder:
        loss = _mean_loss(logits, batch["labels"])
        loss += 0.0 if next_logits is None else _mean_loss(next_logits, batch["next_labels"])
    else:
        loss = _mean_loss(logits[:, :-1], batch["labels"][:, 1:])
    next_logits = None if next_logits is None else np.asarray(next_logits)
    return Outputs([np.asarray(x) for x in hidden], np.asarray(logits), next_logits, loss)


def _mean_loss(logits: jax.Array, labels: np.ndarray) -> float:
    losses = np.asarray(jax.jit(cross_entropy)(logits, jnp.maximum(jnp.asarray(labels), 0)), np.float64)
    return float(losses[labels != IGNORED].mean())
