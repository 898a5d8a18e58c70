"""Benchmark `cpu_gpt`: an update of a small GPT beside `GPT2LMHeadModel`, eager and compiled, fp32."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from bertgpt_jax.benchmarks.harness import Result, Row, compare, require
from bertgpt_jax.benchmarks.updates import Ours, Torch, agreed_losses, loaded_from, sides
from bertgpt_jax.config import Config
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM


class Settings(Config):
    """Settings of the benchmark."""

    layers: int = Field(default=4, ge=1)
    hidden: int = Field(default=256, ge=8)
    heads: int = Field(default=4, ge=1)
    vocabulary: int = Field(default=8192, ge=2)
    length: int = Field(default=128, ge=8)
    rows: int = Field(default=16, ge=1)
    compute: ComputeConfig = ComputeConfig()
    peers: tuple[Literal["eager", "compile"], ...] = ("eager", "compile")
    rounds: int = Field(default=15, ge=1)
    warmup: int = Field(default=2, ge=0)


def run(settings: Settings) -> Result:
    """Compares the updates; the losses of the first three must agree."""
    require("torch", "transformers", extra="parity", purpose="benchmark cpu_gpt")
    model, batch = make_model(settings), make_batch(settings)
    loaded = loaded_from(model)
    inputs = {"input_ids": batch["tokens"], "labels": batch["tokens"]}
    trainers = [
        Ours("ours", loaded, CausalLM(), batch, settings.compute),
        *(Torch(peer, model, inputs, peer == "compile") for peer in settings.peers),
    ]
    losses = agreed_losses(trainers)
    found = compare(sides(trainers), settings.rounds, settings.warmup)
    bars = {"eager": 0.95, "compile": 0.82}
    shape = f"GPT L{settings.layers} D{settings.hidden} V{settings.vocabulary} S{settings.length} B{settings.rows}"
    times = found["paired"]
    rows = [Row(f"{shape}, update over transformers, {p}", times[p]["median"], "x", bars[p]) for p in settings.peers]
    each = loaded.model_config.flops_per_token(settings.length)
    facts = {
        "losses": losses,
        "gflop": each * settings.rows * settings.length / 1e9,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return Result(tuple(rows), {"update": found}, found["ratios"], facts)


def make_model(settings: Settings) -> Any:
    """A fresh `GPT2LMHeadModel` without dropout."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=settings.vocabulary, n_embd=settings.hidden, n_layer=settings.layers, n_head=settings.heads,
        n_positions=max(settings.length, 128), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def make_batch(settings: Settings) -> dict[str, np.ndarray]:
    """Random tokens and their followers; the last of a row has none, as in transformers."""
    rng, shape = np.random.default_rng(0), (settings.rows, settings.length)
    tokens = rng.integers(0, settings.vocabulary, shape)
    weights = np.ones(shape, np.float32)
    weights[:, -1] = 0
    return {
        "tokens": tokens,
        "positions": np.tile(np.arange(settings.length), (settings.rows, 1)),
        "targets": np.roll(tokens, -1, axis=1),
        "weights": weights,
    }
