"""GPT2LMHeadModel of transformers (names as in transformers 5, modeling_gpt2.py), and minGPT's variant of it."""

from __future__ import annotations

from typing import Any

from bertgpt_jax.corpus.special import SpecialIds
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.transfer.family import (
    TRAINING_ONLY,
    Family,
    choose_activation,
    need,
    refuse_settings,
    token_ids,
    unknown_fields,
    wanted,
)
from bertgpt_jax.transfer.names import Layout, Name, linear, norm

SOURCE = "config.json (gpt2)"

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}

SIZES = {
    "vocab_size": "vocab_size",
    "n_positions": "max_positions",
    "n_embd": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
}
"""Entry of config.json -> our field; GPT-1's are the same."""

DROPOUTS = {"resid_pdrop": "hidden_dropout", "attn_pdrop": "attention_dropout"}
"""Likewise; `embd_pdrop` is `hidden_dropout` too."""

KNOWN = {
    *("vocab_size", "max_positions", "hidden_size", "num_layers", "num_heads", "intermediate_size", "tied_head"),
    *("norm_position", "final_norm", "norm_eps", "activation", "hidden_dropout", "attention_dropout", *TRAINING_ONLY),
}


def layer_names(layout: Layout) -> list[Name]:
    """The table of the layers; GPT-1 shares it, minGPT has other matrices (`linear`) under the same names."""
    layer = "transformer.h.{i}."
    return [
        *norm("layers/attention_norm", layer + "ln_1"),
        *linear("layers/attention/query", layer + "attn.c_attn", layout, part=0),
        *linear("layers/attention/key", layer + "attn.c_attn", layout, part=1),
        *linear("layers/attention/value", layer + "attn.c_attn", layout, part=2),
        *linear("layers/attention/output", layer + "attn.c_proj", layout, inputs=2),
        *norm("layers/feed_forward_norm", layer + "ln_2"),
        *linear("layers/feed_forward/up", layer + "mlp.c_fc", layout),
        *linear("layers/feed_forward/down", layer + "mlp.c_proj", layout),
    ]


def names(config: GptConfig, special: SpecialIds, layout: Layout = "conv") -> list[Name]:
    """The table of GPT-2."""
    rows = [
        Name("token_embedding/table", "transformer.wte.weight"),
        Name("position_embedding/table", "transformer.wpe.weight"),
        *layer_names(layout),
    ]
    if config.final_norm:
        rows += norm("final_norm", "transformer.ln_f")
    if not config.tied_head:
        rows.append(Name("output/table", "lm_head.weight"))
    return rows


def shared(config: GptConfig) -> dict[str, str]:
    """The head repeats the token table."""
    return {"lm_head.weight": "transformer.wte.weight"} if config.tied_head else {}


def obstacles(config: GptConfig) -> list[str]:
    """What GPT2LMHeadModel cannot compute."""
    return [*wanted(config, norm_position=("pre",), final_norm=(True,)), *unknown_fields(config, KNOWN)]


def common_config(config: GptConfig, special: SpecialIds) -> dict[str, Any]:
    """What GPT-2's and GPT-1's config.json share."""
    return {
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        **{theirs: getattr(config, ours) for theirs, ours in DROPOUTS.items()},
        "embd_pdrop": config.hidden_dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": special.eot,
        "eos_token_id": special.eot,
        **token_ids(special),
    }


def to_config(config: GptConfig, special: SpecialIds) -> dict[str, Any]:
    """The tree of config.json."""
    inverse = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **common_config(config, special),
        "n_inner": config.intermediate_size,
        "activation_function": inverse[config.activation],
    }


def common_fields(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """Our fields that GPT-2's and GPT-1's config.json give alike."""
    sizes = need(tree, dict.fromkeys(SIZES, int), source)
    defaults = {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02}
    numbers = need({**defaults, **tree}, dict.fromkeys(defaults, (int, float)), source)
    return {
        "kind": "gpt",
        **{ours: sizes[theirs] for theirs, ours in SIZES.items()},
        **{ours: float(numbers[theirs]) for theirs, ours in DROPOUTS.items()},
        "norm_eps": float(numbers["layer_norm_epsilon"]),
        "initializer_range": float(numbers["initializer_range"]),
        "tied_head": bool(tree.get("tie_word_embeddings", True)),
    }


def from_config(tree: dict[str, Any], tensors: set[str]) -> dict[str, Any]:
    """Fields of our config."""
    only = {
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),  # the same function, other rounding
        "add_cross_attention": (False,),
    }
    refuse_settings(tree, only, SOURCE)
    return {
        **common_fields(tree, SOURCE),
        "intermediate_size": tree.get("n_inner") or 4 * tree["n_embd"],
        "activation": choose_activation(tree.get("activation_function", "gelu_new"), ACTIVATIONS, SOURCE),
    }


GPT2 = Family(
    model_type="gpt2",
    prefix="transformer.",
    names=names,
    shared=shared,
    zeros=lambda config: {},
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    obstacles=obstacles,
    to_config=to_config,
    from_config=from_config,
)
