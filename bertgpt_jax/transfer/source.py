"""Where parameters come from: a checkpoint of ours or a directory of another program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bertgpt_jax.config import build
from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.errors import DataError
from bertgpt_jax.models import make_model
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.parallel.sharding import flatten, unboxed

ModelConfig = BertConfig | GptConfig


class ProofFailed(DataError):
    """What was written is not what was to be written; the message names the first difference."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Parameters in our layout, not yet read; reading some at a time bounds the memory.

    Attributes:
        model_config: with its vocabulary size.
        tokenizer: None where the source has none.
        leaves: path (`layers/attention/query/kernel`) -> (dtype name, shape).
        read: paths -> arrays on the host, checked as far as their source allows (fingerprint, shape, dtype).
        label: what it is, for messages (`runs/bert, step 1,200`).
        step: of the checkpoint; None where there is no such thing.
        meta: the checkpoint's meta data; {} elsewhere.
    """

    model_config: ModelConfig
    tokenizer: Tokenizer | None
    leaves: dict[str, tuple[str, tuple[int, ...]]]
    read: Callable[[Sequence[str]], dict[str, np.ndarray]]
    label: str
    step: int | None
    meta: dict[str, Any]


VOCABULARY = ("token_embedding/table", "masked_output/table", "masked_bias", "output/table")
"""Parameters with a row a token."""


def without_padding(source: Source) -> Source:
    """The same parameters without the rows beyond the vocabulary that `vocab_multiple` adds."""
    config, words = source.model_config, source.model_config.vocab_size
    if config.vocab_rows == words:
        return source

    def cut(paths: Sequence[str]) -> dict[str, np.ndarray]:
        return {path: a[:words] if path in VOCABULARY else a for path, a in source.read(paths).items()}

    leaves = {
        path: (dtype, (words, *shape[1:]) if path in VOCABULARY else shape)
        for path, (dtype, shape) in source.leaves.items()
    }
    plain = build(type(config), config.model_dump() | {"vocab_multiple": 1}, source.label)
    return dataclasses.replace(source, model_config=plain, leaves=leaves, read=cut)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The nested dict of `path/to/leaf` keys."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def check_vocabulary(model_config: ModelConfig, tokenizer: Tokenizer | None, label: str) -> None:
    """Raises DataError where the tokenizer can produce ids that the model's table does not have."""
    if tokenizer is not None and tokenizer.vocab_size > model_config.vocab_size:
        raise DataError(
            f"{label}: its tokenizer has {tokenizer.vocab_size:,} ids, the model's table {model_config.vocab_size:,} "
            "rows; they do not belong together: give the model's own tokenizer, or train on with rows for the new ids "
            "(init_from=MODEL corpus.tokenizer.path=TOKENIZER)"
        )


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Path -> (dtype, shape) of the parameters of a config; nothing is computed."""
    model = make_model(config, ComputeConfig(unroll_layers=False))
    ids = jax.ShapeDtypeStruct((1, 1), "int32")
    inputs = (ids, ids, ids, AttentionMask(), ids) if config.kind == "bert" else (ids, ids, AttentionMask())
    key = jax.eval_shape(lambda: jax.random.key(0))
    abstract = unboxed(jax.eval_shape(model.init, key, *inputs)["params"])
    return {path: (leaf.dtype.name, tuple(leaf.shape)) for path, leaf in flatten(abstract).items()}
