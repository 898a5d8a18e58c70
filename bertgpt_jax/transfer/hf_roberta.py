"""RobertaForMaskedLM of transformers (names as in transformers 5, modeling_roberta.py)."""

from __future__ import annotations

from typing import Any

from bertgpt_jax.corpus.special import SpecialIds
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.transfer.family import Family, unknown_fields, wanted
from bertgpt_jax.transfer.hf_bert import KNOWN, common_config, common_fields, encoder_names
from bertgpt_jax.transfer.names import Name, linear, norm

SOURCE = "config.json (roberta)"


def first_position(special: SpecialIds) -> int:
    """Theirs numbers positions from the padding id + 1 (fairseq; `create_position_ids_from_input_ids`)."""
    return (1 if special.pad is None else special.pad) + 1


def names(config: BertConfig, special: SpecialIds) -> list[Name]:
    """The table of RoBERTa; rows of the position table that no position uses come or go with the padding id."""
    embeddings = "roberta.embeddings."
    rows = [
        Name("token_embedding/table", embeddings + "word_embeddings.weight"),
        Name(
            "position_embedding/table",
            embeddings + "position_embeddings.weight",
            skipped_rows=config.position_offset - first_position(special),
        ),
        *encoder_names("roberta"),
        *linear("masked_transform", "lm_head.dense"),
        *norm("masked_norm", "lm_head.layer_norm"),
    ]
    if config.type_vocab_size:
        rows.append(Name("type_embedding/table", embeddings + "token_type_embeddings.weight"))
    if config.tied_head:
        rows.append(Name("masked_bias", "lm_head.bias"))
    else:
        rows += [Name("masked_output/table", "lm_head.decoder.weight"), Name("masked_bias", "lm_head.decoder.bias")]
    return rows


def shared(config: BertConfig) -> dict[str, str]:
    """The decoder repeats the token table and the bias."""
    if not config.tied_head:
        return {"lm_head.bias": "lm_head.decoder.bias"}
    return {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }


def zeros(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Theirs always adds a token type."""
    if config.type_vocab_size:
        return {}
    return {"roberta.embeddings.token_type_embeddings.weight": (1, config.hidden_size)}


def obstacles(config: BertConfig) -> list[str]:
    """What RobertaForMaskedLM cannot compute; its head has the erf GELU whatever `hidden_act` says."""
    return [
        *wanted(config, norm_position=("post",), next_sentence_head=(False,), activation=("gelu",)),
        *unknown_fields(config, KNOWN | {"norm_position"}),
    ]


def to_config(config: BertConfig, special: SpecialIds) -> dict[str, Any]:
    """The tree of config.json."""
    return {
        "architectures": ["RobertaForMaskedLM"],
        "model_type": "roberta",
        **common_config(config, special),
        "max_position_embeddings": config.max_positions + first_position(special),
        "pad_token_id": first_position(special) - 1,
        "bos_token_id": special.cls,
        "eos_token_id": special.sep,
    }


def from_config(tree: dict[str, Any], tensors: set[str]) -> dict[str, Any]:
    """Fields of our config."""
    offset = first_position(SpecialIds(pad=tree.get("pad_token_id", 1)))
    return {
        "kind": "bert",
        **common_fields(tree, SOURCE),
        "max_positions": tree["max_position_embeddings"] - offset,
        "position_offset": offset,
        "type_vocab_size": tree.get("type_vocab_size", 2),
        "norm_eps": tree.get("layer_norm_eps", 1e-12),
        "next_sentence_head": False,
    }


ROBERTA = Family(
    model_type="roberta",
    prefix="roberta.",
    names=names,
    shared=shared,
    zeros=zeros,
    ignored=(r"roberta\.embeddings\.(position_ids|token_type_ids)", r"roberta\.pooler\.dense\.(weight|bias)"),
    obstacles=obstacles,
    to_config=to_config,
    from_config=from_config,
)
