"""OpenAIGPTLMHeadModel of transformers, GPT-1 (names as in transformers 5, modeling_openai.py)."""

from __future__ import annotations

from typing import Any

from bertgpt_jax.corpus.special import SpecialIds
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.transfer.family import Family, choose_activation, unknown_fields, wanted
from bertgpt_jax.transfer.hf_gpt2 import KNOWN, common_config, common_fields, layer_names
from bertgpt_jax.transfer.names import Name

SOURCE = "config.json (openai-gpt)"

ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu"}
"""Their `gelu` is the tanh approximation (modeling_openai.py, ACT_FNS)."""


def names(config: GptConfig, special: SpecialIds) -> list[Name]:
    """The table of GPT-1."""
    rows = [
        Name("token_embedding/table", "transformer.tokens_embed.weight"),
        Name("position_embedding/table", "transformer.positions_embed.weight"),
        *layer_names("conv"),
    ]
    return rows if config.tied_head else [*rows, Name("output/table", "lm_head.weight")]


def shared(config: GptConfig) -> dict[str, str]:
    """The head repeats the token table."""
    return {"lm_head.weight": "transformer.tokens_embed.weight"} if config.tied_head else {}


def obstacles(config: GptConfig) -> list[str]:
    """What OpenAIGPTLMHeadModel cannot compute; its feed-forward width is always four times the model's."""
    found = wanted(config, norm_position=("post",), final_norm=(False,), activation=tuple(ACTIVATIONS.values()))
    found += wanted(config, intermediate_size=(4 * config.hidden_size,))
    return [*found, *unknown_fields(config, KNOWN)]


def to_config(config: GptConfig, special: SpecialIds) -> dict[str, Any]:
    """The tree of config.json."""
    return {
        "architectures": ["OpenAIGPTLMHeadModel"],
        "model_type": "openai-gpt",
        **common_config(config, special),
        "afn": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation],
    }


def from_config(tree: dict[str, Any], tensors: set[str]) -> dict[str, Any]:
    """Fields of our config."""
    return {
        **common_fields(tree, SOURCE),
        "intermediate_size": 4 * tree["n_embd"],
        "activation": choose_activation(tree.get("afn", "gelu"), ACTIVATIONS, SOURCE),
        "norm_position": "post",
        "final_norm": False,
        "position_initializer_range": float(tree.get("initializer_range", 0.02)),
        "residual_initializer": "same",
    }


GPT1 = Family(
    model_type="openai-gpt",
    prefix="transformer.",
    names=names,
    shared=shared,
    zeros=lambda config: {},
    ignored=(r"transformer\.h\.\d+\.attn\.bias", r"transformer\.position_ids"),
    obstacles=obstacles,
    to_config=to_config,
    from_config=from_config,
)
