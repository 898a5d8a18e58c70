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
    model, params = make_model(config, COMPUTE), {"params": top}
    tokens = jnp.asarray(batch["tokens"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    encoder = config.kind == "bert"
    mask = segment_mask(jnp.asarray(batch["attention"])) if encoder else causal_mask()
    types = (jnp.asarray(batch["types"]),) if encoder else ()
    step = jax.jit(lambda weights, x: Block(config).apply({"params": weights}, x, mask)[0])
    with jax.default_matmul_precision("highest"):
        hidden = [model.apply(params, tokens, positions, *types, method="embed")]
        for i in range(layers):
            hidden.append(step(layer(i), hidden[-1]))
        next_logits = None
        if encoder:
            logits = model.apply(params, hidden[-1], positions, method="masked_logits")
            loss = _mean_loss(logits, batch["labels"])
            if config.next_sentence_head:
                next_logits = model.apply(params, hidden[-1], method="next_sentence_logits")
                loss += _mean_loss(next_logits, batch["next_labels"])
        else:
            hidden[-1] = model.apply(params, hidden[-1], method="normalize")
            logits = model.apply(params, hidden[-1], method="logits")
            loss = _mean_loss(logits[:, :-1], batch["labels"][:, 1:])
    next_logits = None if next_logits is None else np.asarray(next_logits)
    return Outputs([np.asarray(x) for x in hidden], np.asarray(logits), next_logits, loss)


def _mean_loss(logits: jax.Array, labels: np.ndarray) -> float:
    losses = np.asarray(cross_entropy(logits, jnp.maximum(jnp.asarray(labels), 0)), np.float64)
    return float(losses[labels != IGNORED].mean())
