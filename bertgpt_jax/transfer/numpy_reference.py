"""The forward of an exported directory in NumPy alone, from its config.json and tensors, one layer in memory at a time.

Written from the definitions of transformers' BertForPreTraining, BertForMaskedLM, RobertaForMaskedLM, GPT2LMHeadModel
and OpenAIGPTLMHeadModel, in double precision; it knows nothing of our models and name maps, so that it can judge them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Tensor = Callable[[str], np.ndarray]
MASKED = -1e30
IGNORED = -100


class Outputs(NamedTuple):
    """What two implementations of a model are compared in.

    Attributes:
        hidden: embeddings and each layer's output [B, T, D]; the last one as the head reads it.
        logits: [B, T, V].
        next_logits: [B, 2] where the model has that head.
        loss: as the model's class defines it.
    """

    hidden: list[np.ndarray]
    logits: np.ndarray
    next_logits: np.ndarray | None
    loss: float


def forward(config: dict[str, Any], tensor: Tensor, batch: dict[str, np.ndarray], layers: int) -> Outputs:
    """Runs the first `layers` layers of the model of a config.json, then its head.

    Args:
        tensor: name -> array.
        batch: `tokens`, `attention` [B, T], `labels` [B, T] (-100: not scored); `types` and `next_labels` for encoders.
    """

    def double(name: str) -> np.ndarray:
        return tensor(name).astype(np.float64)

    if config["model_type"] in ("bert", "roberta"):
        return _encoder(config, double, batch, layers)
    return _decoder(config, double, batch, layers)


# ---------------------------------------------------------------- pieces

_erf = np.frompyfunc(math.erf, 1, 1)


def _activation(name: str) -> Callable[[np.ndarray], np.ndarray]:
    def tanh_gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + _erf(x / math.sqrt(2)).astype(np.float64))

    return {"gelu": gelu, "gelu_new": tanh_gelu, "relu": lambda x: np.maximum(x, 0)}[name]


def _norm(tensor: Tensor, name: str, eps: float, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * tensor(f"{name}.weight") + tensor(f"{name}.bias")


def _linear(tensor: Tensor, name: str, x: np.ndarray) -> np.ndarray:
    return x @ tensor(f"{name}.weight").T + tensor(f"{name}.bias")


def _conv(tensor: Tensor, name: str, x: np.ndarray) -> np.ndarray:
    return x @ tensor(f"{name}.weight") + tensor(f"{name}.bias")


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, allowed: np.ndarray) -> np.ndarray:
    """Multi-head attention of [B, T, D] arrays; `allowed` broadcasts to [B, 1, T, T]."""
    rows, length, width = q.shape

    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(rows, length, heads, width // heads).transpose(0, 2, 1, 3)

    scores = split(q) @ split(k).transpose(0, 1, 3, 2) / math.sqrt(width // heads)
    scores = np.where(allowed, scores, MASKED)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ split(v)).transpose(0, 2, 1, 3).reshape(rows, length, width)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log softmax(logits)[label] over the labels that are not -100."""
    wide = logits.astype(np.float64)
    high = wide.max(-1)
    total = np.log(np.exp(wide - high[..., None]).sum(-1)) + high
    picked = np.take_along_axis(wide, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return float((total - picked)[labels != IGNORED].mean())


# ---------------------------------------------------------------- models


def _encoder(config: dict[str, Any], tensor: Tensor, batch: dict[str, np.ndarray], layers: int) -> Outputs:
    kind, eps = config["model_type"], config["layer_norm_eps"]
    act = _activation(config["hidden_act"])
    real = batch["attention"].astype(np.int64)
    positions = np.broadcast_to(np.arange(real.shape[1]), real.shape)
    if kind == "roberta":
        padding = config["pad_token_id"]
        present = (batch["tokens"] != padding).astype(np.int64)
        positions = np.cumsum(present, 1) * present + padding
    table = f"{kind}.embeddings."
    x = tensor(table + "word_embeddings.weight")[batch["tokens"]]
    x = x + tensor(table + "position_embeddings.weight")[positions]
    x = x + tensor(table + "token_type_embeddings.weight")[batch["types"]]
    hidden = [_norm(tensor, table + "LayerNorm", eps, x)]
    allowed = real[:, None, None, :] > 0
    for i in range(layers):
        name, x = f"{kind}.encoder.layer.{i}.", hidden[-1]
        q, k, v = (_linear(tensor, f"{name}attention.self.{part}", x) for part in ("query", "key", "value"))
        attended = _attend(q, k, v, config["num_attention_heads"], allowed)
        attended = _linear(tensor, name + "attention.output.dense", attended)
        x = _norm(tensor, name + "attention.output.LayerNorm", eps, x + attended)
        inner = act(_linear(tensor, name + "intermediate.dense", x))
        hidden.append(_norm(tensor, name + "output.LayerNorm", eps, x + _linear(tensor, name + "output.dense", inner)))
    x = hidden[-1]
    if kind == "roberta":
        x = _norm(tensor, "lm_head.layer_norm", eps, _activation("gelu")(_linear(tensor, "lm_head.dense", x)))
        logits = _linear(tensor, "lm_head.decoder", x)
    else:
        x = act(_linear(tensor, "cls.predictions.transform.dense", x))
        x = _norm(tensor, "cls.predictions.transform.LayerNorm", eps, x)
        logits = _linear(tensor, "cls.predictions.decoder", x)
    loss, next_logits = cross_entropy(logits, batch["labels"]), None
    if config["architectures"] == ["BertForPreTraining"]:
        pooled = np.tanh(_linear(tensor, "bert.pooler.dense", hidden[-1][:, 0]))
        next_logits = _linear(tensor, "cls.seq_relationship", pooled)
        loss += cross_entropy(next_logits, batch["next_labels"])
    return Outputs(hidden, logits, next_logits, loss)


def _decoder(config: dict[str, Any], tensor: Tensor, batch: dict[str, np.ndarray], layers: int) -> Outputs:
    second, eps, heads = config["model_type"] == "gpt2", config["layer_norm_epsilon"], config["n_head"]
    act = _activation(
        config["activation_function"] if second else {"gelu": "gelu_new"}.get(config["afn"], config["afn"])
    )
    tokens, length = batch["tokens"], batch["tokens"].shape[1]
    tables = ("wte", "wpe") if second else ("tokens_embed", "positions_embed")
    x = tensor(f"transformer.{tables[0]}.weight")[tokens] + tensor(f"transformer.{tables[1]}.weight")[:length]
    hidden, allowed = [x], np.tri(length, dtype=bool)
    for i in range(layers):
        name = f"transformer.h.{i}."

        def attention(x: np.ndarray, name: str = name) -> np.ndarray:
            q, k, v = np.split(_conv(tensor, name + "attn.c_attn", x), 3, -1)
            return _conv(tensor, name + "attn.c_proj", _attend(q, k, v, heads, allowed))

        def feed_forward(x: np.ndarray, name: str = name) -> np.ndarray:
            return _conv(tensor, name + "mlp.c_proj", act(_conv(tensor, name + "mlp.c_fc", x)))

        if second:
            x = x + attention(_norm(tensor, name + "ln_1", eps, x))
            x = x + feed_forward(_norm(tensor, name + "ln_2", eps, x))
        else:
            x = _norm(tensor, name + "ln_1", eps, x + attention(x))
            x = _norm(tensor, name + "ln_2", eps, x + feed_forward(x))
        hidden.append(x)
    if second:
        hidden[-1] = _norm(tensor, "transformer.ln_f", eps, hidden[-1])
    logits = hidden[-1] @ tensor("lm_head.weight").T
    return Outputs(hidden, logits, None, cross_entropy(logits[:, :-1], batch["labels"][:, 1:]))
