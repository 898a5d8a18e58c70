"""The table of families, and which of them a config of ours is written as."""

from __future__ import annotations

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.transfer.family import Family
from bertgpt_jax.transfer.hf_bert import BERT
from bertgpt_jax.transfer.hf_gpt1 import GPT1
from bertgpt_jax.transfer.hf_gpt2 import GPT2
from bertgpt_jax.transfer.hf_roberta import ROBERTA
from bertgpt_jax.transfer.source import ModelConfig

FAMILIES = {family.model_type: family for family in (BERT, ROBERTA, GPT2, GPT1)}
"""`model_type` of a config.json -> its family."""


def family_of(config: ModelConfig) -> Family:
    """The family that a model of ours is.

    Raises:
        ConfigError: listing everything that transformers cannot express.
    """
    if config.kind == "bert":  # positions that do not begin at 0 are RoBERTa's, unless it has BERT's second head
        family = ROBERTA if config.position_offset and not config.next_sentence_head else BERT
    else:
        family = GPT1 if config.norm_position == "post" else GPT2
    found = family.obstacles(config)
    if found:
        raise ConfigError(
            f"transformers has no '{family.model_type}' like this model: {'; '.join(found)}; "
            "use --format npz or stablehlo, which take every model"
        )
    return family
