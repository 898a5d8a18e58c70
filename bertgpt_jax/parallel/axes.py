"""The one table from logical axes, which models name, to mesh axes."""

from __future__ import annotations

LOGICAL_AXES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # activations
    ("rows", ("pipe", "data", "fsdp")),  # a batch outside the layers: stages share what is not theirs alone
    ("batch", ("data", "fsdp")),  # inside
    ("stages", "pipe"),
    ("length", "context"),
    ("predictions", "context"),  # masked positions, gathered from all over the row
    ("act_embed", None),  # batch already uses fsdp, and an array may use a mesh axis once
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
    # parameters
    ("layers", "pipe"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("positions", None),
    ("types", None),
    ("norm", None),
    ("classes", None),
)
"""Weights are split over fsdp by model width and over tensor by heads, feed-forward width or vocabulary (Megatron)."""
