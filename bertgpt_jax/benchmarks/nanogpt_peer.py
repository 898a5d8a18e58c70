"""The peer of `time_to_loss`: a small GPT in PyTorch, trained in one process as nanoGPT does.

Model, initialisation, optimizer, clipping and schedule are those of the config it is given, a run of ours: fused AdamW,
`scaled_dot_product_attention`, batches of random windows (karpathy/nanoGPT train.py). The held-out loss is over the
windows that ours is over. It prints `step N held out: loss L`.
"""

from __future__ import annotations

import gzip
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, Any]
LAYER = (
    *(f"{name}.{part}" for name in ("qkv", "out", "up", "down") for part in ("weight", "bias")),
    *(f"{name}.{part}" for name in ("first", "second") for part in ("scale", "bias")),
)
"""Parameters of a layer."""


def make_parameters(model: dict[str, Any], words: int) -> Tensors:
    """Fresh parameters; those of a layer are named `<layer>.<name>`, matrices `.weight`."""
    import torch

    width, wide, layers = model["hidden_size"], model["intermediate_size"], model["num_layers"]
    std = model["initializer_range"]
    deep = std / math.sqrt(2 * layers)
    made = {
        "tokens.weight": torch.randn(words, width) * std,
        "positions.weight": torch.randn(model["max_positions"], width) * std,
    }
    for i in range(layers):
        linear = [("qkv", width, 3 * width, std), ("out", width, width, deep)]
        linear += [("up", width, wide, std), ("down", wide, width, deep)]
        for name, ins, outs, scale in linear:
            made[f"{i}.{name}.weight"], made[f"{i}.{name}.bias"] = torch.randn(outs, ins) * scale, torch.zeros(outs)
    for norm in [f"{i}.{name}" for i in range(layers) for name in ("first", "second")] + ["norm"]:
        made[f"{norm}.scale"], made[f"{norm}.bias"] = torch.ones(width), torch.zeros(width)
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def loss_function(
    model: dict[str, Any], compiled: Callable[[Callable], Callable] | None = None
) -> Callable[[Tensors, Any, Any], Any]:
    """(parameters, tokens, targets) -> mean cross-entropy of a pre-norm GPT with a tied head.

    Args:
        compiled: `torch.compile`, for a layer and the head each: a layer is then compiled once for all of them.
    """
    from torch.nn import functional as F

    heads, width = model["num_heads"], model["hidden_size"]

    def norm(p: Tensors, name: str, x: Any) -> Any:
        return F.layer_norm(x, (width,), p[f"{name}.scale"], p[f"{name}.bias"])

    def linear(p: Tensors, name: str, x: Any) -> Any:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def layer(p: Tensors, x: Any) -> Any:
        rows, length, _ = x.shape
        qkv = linear(p, "qkv", norm(p, "first", x)).split(width, dim=2)
        q, k, v = (y.view(rows, length, heads, width // heads).transpose(1, 2) for y in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, length, width)
        x = x + linear(p, "out", y)
        up = F.gelu(linear(p, "up", norm(p, "second", x)), approximate="tanh")
        return x + linear(p, "down", up)

    def head(p: Tensors, x: Any, targets: Any) -> Any:
        logits = F.linear(norm(p, "norm", x), p["tokens.weight"])
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    if compiled is not None:
        layer, head = compiled(layer), compiled(head)

    def loss(p: Tensors, tokens: Any, targets: Any) -> Any:
        x = F.embedding(tokens, p["tokens.weight"]) + p["positions.weight"][: tokens.shape[1]]
        for i in range(model["num_layers"]):
            x = layer({name: p[f"{i}.{name}"] for name in LAYER}, x)
        return head({name: p[name] for name in ("norm.scale", "norm.bias", "tokens.weight")}, x, targets)

    return loss


def read(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
    """(train ids, held-out ids, number of characters) of the config's text."""
    path = config["corpus"]["path"]
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8", newline="") as file:
        text = file.read()
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    ids = np.array([letters[letter] for letter in text], np.int64)
    cut = int(len(ids) * (1 - config["corpus"]["held_out"]["fraction"]))
    return ids[:cut], ids[cut:], len(letters)


def make_optimizer(parameters: Tensors, settings: dict[str, Any]) -> Any:
    """AdamW that decays matrices alone."""
    import torch

    decayed = {True: [], False: []}
    for name, tensor in parameters.items():
        decayed[name.endswith(".weight")].append(tensor)
    groups = [{"params": tensors, "weight_decay": settings["weight_decay"] * does} for does, tensors in decayed.items()]
    return torch.optim.AdamW(groups, betas=(settings["b1"], settings["b2"]), eps=settings["eps"], fused=True)


def rate(schedule: dict[str, Any], step: int, steps: int) -> float:
    """The learning rate of the update after `step` updates: warm-up, then half a cosine."""
    peak, warm, final = schedule["peak"], schedule["warmup_steps"], schedule["final_fraction"]
    if step < warm:
        return peak * (step + 1) / warm
    share = (step - warm) / (steps - warm)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share)))


def held_out_loss(
    loss: Callable, parameters: Tensors, ids: np.ndarray, length: int, rows: int = 64, plain: Callable | None = None
) -> float:
    """Mean over the whole split, in windows that do not overlap.

    Args:
        plain: the same function for the last, smaller batch, for whose shape nothing is to be compiled; None: `loss`.
    """
    import torch

    windows = (len(ids) - 1) // length
    x = torch.from_numpy(ids[: windows * length].reshape(windows, length)).split(rows)
    y = torch.from_numpy(ids[1 : windows * length + 1].reshape(windows, length)).split(rows)
    with torch.no_grad():
        total = sum(
            (loss if len(a) == rows else plain or loss)(parameters, a, b).item() * len(a)
            for a, b in zip(x, y, strict=True)
        )
    return total / windows


def train(config: dict[str, Any], compiled: bool, eval_every: int) -> None:
    """Trains the first stage of a config."""
    import torch

    stage = config["stages"][0]
    steps, length, rows = stage["steps"], stage["sequence_length"], stage["batch_size"]
    torch.manual_seed(config["seed"])
    rng = np.random.default_rng(config["seed"])
    ids, held_out, words = read(config)
    parameters, loss = make_parameters(config["model"], words), loss_function(config["model"])
    optimizer = make_optimizer(parameters, stage["optimizer"])
    run = torch.compile(loss, dynamic=False) if compiled else loss
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(stage["schedule"], step, steps)
        first = rng.integers(0, len(ids) - length, rows)
        window = torch.from_numpy(ids[first[:, None] + np.arange(length + 1)])
        run(parameters, window[:, :-1].contiguous(), window[:, 1:].contiguous()).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), stage["optimizer"]["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % eval_every == 0 or step + 1 == steps:
            found = held_out_loss(run, parameters, held_out, length, plain=loss)
            print(f"step {step + 1:,} held out: loss {found:.4f}", flush=True)


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text("utf-8")), sys.argv[2] == "compile", int(sys.argv[3]))
