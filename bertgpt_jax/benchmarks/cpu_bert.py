"""Benchmark `cpu_bert`: an update of a small BERT beside `BertForPreTraining`, eager and compiled, fp32.

Ours computes vocabulary logits only at the masked positions; the peers, and our side `full_head`, at all of them. So
the first ratios show an algorithm with its code, those of `full_head` the code alone.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.benchmarks.harness import Result, Row, measure, require, summary
from bertgpt_jax.benchmarks.updates import Ours, Torch, agreed_losses, loaded_from, sides
from bertgpt_jax.config import Config
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP

IGNORED = -100
"""transformers' label of a position that is not scored."""


class Settings(Config):
    """Settings of the benchmark."""

    layers: int = Field(default=4, ge=1)
    hidden: int = Field(default=256, ge=8)
    heads: int = Field(default=4, ge=1)
    vocabulary: int = Field(default=30_522, ge=110)
    length: int = Field(default=128, ge=16)
    rows: int = Field(default=16, ge=1)
    masked: float = Field(default=0.15, gt=0, lt=1)
    compute: ComputeConfig = ComputeConfig()
    peers: tuple[Literal["eager", "compile"], ...] = ("eager", "compile")
    rounds: int = Field(default=15, ge=1)
    warmup: int = Field(default=2, ge=0)


def run(settings: Settings) -> Result:
    """Compares the updates; the losses of the first three must agree."""
    require("torch", "transformers", extra="parity", purpose="benchmark cpu_bert")
    model, batch = make_model(settings), make_batch(settings)
    loaded, everywhere = loaded_from(model), every_position(batch)
    gathered = MaskedLMNSP(masking=Masking(rate=settings.masked))
    full = MaskedLMNSP(masking=Masking(rate=settings.masked, max_predictions=settings.length))
    trainers = [
        Ours("ours", loaded, gathered, batch, settings.compute),
        Ours("full_head", loaded, full, everywhere, settings.compute),
        *(Torch(peer, model, torch_inputs(batch), peer == "compile") for peer in settings.peers),
    ]
    losses = agreed_losses(trainers)
    columns = measure(sides(trainers), settings.rounds, settings.warmup)
    found = summary(columns, settings.warmup)
    code = summary({name: columns[name] for name in ("full_head", *settings.peers)}, settings.warmup)
    bars = {"eager": 2.0, "compile": 1.7}
    shape = f"BERT L{settings.layers} D{settings.hidden} V{settings.vocabulary} S{settings.length} B{settings.rows}"
    times, alone = found["paired"], code["paired"]
    rows = [Row(f"{shape}, update over transformers, {p}", times[p]["median"], "x", bars[p]) for p in settings.peers]
    rows += [Row(f"the same, all positions scored, {p}", alone[p]["median"], "x") for p in settings.peers]
    facts = {
        "losses": losses,
        "ratios_without_gather": code["ratios"],
        "gflop": {
            "ours": gflop(loaded.model_config, settings, gathered),
            "full_head": gflop(loaded.model_config, settings, full),
        },
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    comparisons = {"update": found, "update, all positions scored": code}
    return Result(tuple(rows), comparisons, {peer: found["ratios"][peer] for peer in settings.peers}, facts)


def gflop(model: Any, settings: Settings, objective: MaskedLMNSP) -> float:
    """Arithmetic of an update by the analytic formula, in 1e9."""
    each = model.flops_per_token(settings.length, objective.scored_share(settings.length))
    return each * settings.rows * settings.length / 1e9


def make_model(settings: Settings) -> Any:
    """A fresh `BertForPreTraining` without dropout."""
    import torch
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=settings.vocabulary, hidden_size=settings.hidden, num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads, intermediate_size=4 * settings.hidden,
        max_position_embeddings=max(settings.length, 512), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForPreTraining(config)


def make_batch(settings: Settings) -> dict[str, np.ndarray]:
    """A batch of full rows of random tokens, in our arrays."""
    rng, length = np.random.default_rng(0), settings.length
    rows, width = settings.rows, Masking(rate=settings.masked).predictions(length)
    count = max(1, round(settings.masked * length))
    places = np.zeros((rows, width), np.int32)
    for row in places:
        row[:count] = np.sort(rng.permutation(np.arange(1, length - 1))[:count])
    used = np.arange(width) < np.full((rows, 1), count)
    return {
        "tokens": rng.integers(100, settings.vocabulary, (rows, length)),
        "positions": np.tile(np.arange(length), (rows, 1)),
        "segments": np.ones((rows, length), np.int32),
        "types": np.tile(np.arange(length) >= length // 2, (rows, 1)).astype(np.int32),
        "mask_positions": places,
        "mask_labels": np.where(used, rng.integers(100, settings.vocabulary, places.shape), 0),
        "mask_weights": used.astype(np.float32),
        "next_labels": rng.integers(0, 2, rows),
        "next_weights": np.ones(rows, np.float32),
    }


def every_position(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same batch with a prediction slot for every position, weight 0 where nothing is predicted."""
    rows, length = batch["tokens"].shape
    row, slot = np.nonzero(batch["mask_weights"])
    place = batch["mask_positions"][row, slot]
    labels, weights = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.float32)
    labels[row, place], weights[row, place] = batch["mask_labels"][row, slot], 1
    positions = np.tile(np.arange(length), (rows, 1))
    return batch | {"mask_positions": positions, "mask_labels": labels, "mask_weights": weights}


def torch_inputs(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch as `BertForPreTraining` takes it."""
    everywhere = every_position(batch)
    return {
        "input_ids": batch["tokens"],
        "attention_mask": batch["segments"].astype(np.int64),
        "token_type_ids": batch["types"].astype(np.int64),
        "labels": np.where(everywhere["mask_weights"] > 0, everywhere["mask_labels"], IGNORED).astype(np.int64),
        "next_sentence_label": batch["next_labels"],
    }
