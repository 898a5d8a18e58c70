"""The run that a source of parameters comes from, or one that fits it: objective, lengths, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bertgpt_jax.config import build, parse_json
from bertgpt_jax.corpus.config import (
    ByteBPEConfig,
    CharactersConfig,
    SentencePieceConfig,
    TokenizerConfig,
    WordPieceConfig,
)
from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.errors import ConfigError, UserError
from bertgpt_jax.training.run_config import RunConfig
from bertgpt_jax.transfer.source import Source

TRAINING_ARGS = "training_args.json"
TOKENIZERS = {
    "wordpiece": WordPieceConfig,
    "byte_bpe": ByteBPEConfig,
    "sentencepiece": SentencePieceConfig,
    "characters": CharactersConfig,
}


def run_config(source: Source) -> RunConfig:
    """The config of the run that trained the source, with the source's model; else one with the family's objective.

    Raises:
        ConfigError: no run fits the model (fewer than 8 positions).
    """
    tree = source.meta.get("config") or _trained_with(source)
    model = source.model_config.model_dump(mode="json")
    if tree is not None:
        try:
            return build(RunConfig, {**tree, "model": model, "init_from": ""}, source.label)
        except UserError:
            pass  # of another version: its sizes are in the model all the same
    length = min(source.model_config.max_positions, 512)
    schedule = {"kind": "constant", "warmup_steps": 0}
    stage = {"name": "imported", "steps": 1, "sequence_length": length, "batch_size": 8, "schedule": schedule}
    corpus: dict[str, Any] = {"kind": "single", "path": ""}
    if source.tokenizer is not None:
        corpus["tokenizer"] = tokenizer_config(source.tokenizer.kind, "", source.tokenizer).model_dump(mode="json")
    objective = {"kind": objective_kind(source)}
    return build(RunConfig, {"corpus": corpus, "model": model, "objective": objective, "stages": [stage]}, source.label)


def objective_kind(source: Source) -> str:
    """What a model of this shape is pretrained with."""
    if source.model_config.kind == "gpt":
        return "causal_lm"
    return "masked_lm_nsp" if source.model_config.next_sentence_head else "masked_lm"


def _trained_with(source: Source) -> dict[str, Any] | None:
    """The config that an export of ours carries."""
    path = Path(source.label) / TRAINING_ARGS
    if not path.is_file():
        return None
    try:
        tree = parse_json(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError, ConfigError):
        return None
    ours = isinstance(tree, dict) and tree.get("trained_with") == "bertgpt_jax"
    return tree.get("config") if ours and isinstance(tree.get("config"), dict) else None


def tokenizer_config(kind: str, path: str, tokenizer: Tokenizer | None) -> TokenizerConfig:
    """The corpus setting that loads a saved tokenizer.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in TOKENIZERS:
        raise ConfigError(f"tokenizer kind '{kind}' is unknown; known: {', '.join(TOKENIZERS)}")
    size = {} if tokenizer is None or kind == "characters" else {"vocab_size": tokenizer.vocab_size}
    return build(TOKENIZERS[kind], {"path": path, **size}, "tokenizer")
