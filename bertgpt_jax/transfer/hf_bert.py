"""BertForPreTraining and BertForMaskedLM of transformers (names as in transformers 5, modeling_bert.py)."""

from __future__ import annotations

from typing import Any

from bertgpt_jax.corpus.special import SpecialIds
from bertgpt_jax.models.bert import BertConfig
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
from bertgpt_jax.transfer.names import Name, linear, norm

SOURCE = "config.json (bert)"

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
}
"""Entry of config.json -> our field; RoBERTa's are the same."""


def encoder_names(prefix: str) -> list[Name]:
    """The table of the layers; RoBERTa's are the same below another prefix."""
    layer = f"{prefix}.encoder.layer.{{i}}."
    attention = f"{layer}attention."
    return [
        *norm("embedding_norm", f"{prefix}.embeddings.LayerNorm"),
        *linear("layers/attention/query", f"{attention}self.query"),
        *linear("layers/attention/key", f"{attention}self.key"),
        *linear("layers/attention/value", f"{attention}self.value"),
        *linear("layers/attention/output", f"{attention}output.dense", inputs=2),
        *norm("layers/attention_norm", f"{attention}output.LayerNorm"),
        *linear("layers/feed_forward/up", f"{layer}intermediate.dense"),
        *linear("layers/feed_forward/down", f"{layer}output.dense"),
        *norm("layers/feed_forward_norm", f"{layer}output.LayerNorm"),
    ]


def names(config: BertConfig, special: SpecialIds) -> list[Name]:
    """The table of BERT."""
    embeddings, head = "bert.embeddings.", "cls.predictions."
    rows = [
        Name("token_embedding/table", embeddings + "word_embeddings.weight"),
        Name(
            "position_embedding/table",
            embeddings + "position_embeddings.weight",
            skipped_rows=config.position_offset,  # theirs count from 0
        ),
        *encoder_names("bert"),
        *linear("masked_transform", head + "transform.dense"),
        *norm("masked_norm", head + "transform.LayerNorm"),
    ]
    if config.type_vocab_size:
        rows.append(Name("type_embedding/table", embeddings + "token_type_embeddings.weight"))
    if config.tied_head:
        rows.append(Name("masked_bias", head + "bias"))
    else:  # the decoder's own bias is what the untied head adds; `bias` is then a copy that nobody reads
        rows += [Name("masked_output/table", head + "decoder.weight"), Name("masked_bias", head + "decoder.bias")]
    if config.next_sentence_head:
        rows += [*linear("pooler", "bert.pooler.dense"), *linear("next_sentence", "cls.seq_relationship")]
    return rows


def shared(config: BertConfig) -> dict[str, str]:
    """The decoder repeats the token table and the bias."""
    head = "cls.predictions."
    if not config.tied_head:
        return {head + "bias": head + "decoder.bias"}
    return {head + "decoder.weight": "bert.embeddings.word_embeddings.weight", head + "decoder.bias": head + "bias"}


def zeros(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Theirs always adds a token type."""
    if config.type_vocab_size:
        return {}
    return {"bert.embeddings.token_type_embeddings.weight": (1, config.hidden_size)}


KNOWN = {
    *(*SIZES.values(), "max_positions", "position_offset", "type_vocab_size", "next_sentence_head", "tied_head"),
    *("norm_eps", "activation", "hidden_dropout", "attention_dropout", *TRAINING_ONLY),
}


def obstacles(config: BertConfig) -> list[str]:
    """What BertForPreTraining cannot compute."""
    return [*wanted(config, norm_position=("post",)), *unknown_fields(config, KNOWN | {"norm_position"})]


def common_config(config: BertConfig, special: SpecialIds) -> dict[str, Any]:
    """What BERT's and RoBERTa's config.json share."""
    inverse = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
    return {
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "hidden_act": inverse[config.activation],
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "type_vocab_size": config.type_vocab_size or 1,
        "initializer_range": config.initializer_range,
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        **token_ids(special),
    }


def to_config(config: BertConfig, special: SpecialIds) -> dict[str, Any]:
    """The tree of config.json."""
    return {
        "architectures": ["BertForPreTraining" if config.next_sentence_head else "BertForMaskedLM"],
        "model_type": "bert",
        **common_config(config, special),
        "max_position_embeddings": config.max_positions,
    }


def common_fields(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """Our fields that BERT's and RoBERTa's config.json give alike."""
    only = {"is_decoder": (False,), "add_cross_attention": (False,), "position_embedding_type": ("absolute",)}
    refuse_settings(tree, only, source)
    sizes = need(tree, dict.fromkeys([*SIZES, "max_position_embeddings"], int), source)
    defaults = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02}
    numbers = need({**defaults, **tree}, dict.fromkeys(defaults, (int, float)), source)
    return {
        **{ours: sizes[theirs] for theirs, ours in SIZES.items()},
        "activation": choose_activation(tree.get("hidden_act", "gelu"), ACTIVATIONS, source),
        "hidden_dropout": float(numbers["hidden_dropout_prob"]),
        "attention_dropout": float(numbers["attention_probs_dropout_prob"]),
        "initializer_range": float(numbers["initializer_range"]),
        "tied_head": bool(tree.get("tie_word_embeddings", True)),
    }


def from_config(tree: dict[str, Any], tensors: set[str]) -> dict[str, Any]:
    """Fields of our config; the next-sentence head is there if its tensors are."""
    return {
        "kind": "bert",
        **common_fields(tree, SOURCE),
        "max_positions": tree["max_position_embeddings"],
        "type_vocab_size": tree.get("type_vocab_size", 2),
        "norm_eps": tree.get("layer_norm_eps", 1e-12),
        "next_sentence_head": "cls.seq_relationship.weight" in tensors,
    }


BERT = Family(
    model_type="bert",
    prefix="bert.",
    names=names,
    shared=shared,
    zeros=zeros,
    ignored=(r"bert\.embeddings\.(position_ids|token_type_ids)", r"bert\.pooler\.dense\.(weight|bias)"),
    obstacles=obstacles,
    to_config=to_config,
    from_config=from_config,
)
