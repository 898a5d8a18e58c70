"""Model families, one file each: config, module, published sizes. Single-device code; no data, mesh or training."""

from __future__ import annotations

import flax.linen as nn

from bertgpt_jax.models.bert import Bert, BertConfig
from bertgpt_jax.models.gpt import Gpt, GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.pipeline import Pipeline

FAMILIES = {"bert": Bert, "gpt": Gpt}
"""`kind` of a model config -> its module."""


def make_model(config: BertConfig | GptConfig, compute: ComputeConfig, pipeline: Pipeline | None = None) -> nn.Module:
    """The module of a config whose `vocab_size` is known."""
    return FAMILIES[config.kind](config, compute, pipeline)
