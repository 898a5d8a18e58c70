"""Tiny models of every family at odd sizes, as sources of parameters."""

from __future__ import annotations

import numpy as np
import pytest

SIZES = dict(vocab_size=101, num_layers=3, hidden_size=48, num_heads=3, max_positions=77)


def tiny_configs() -> dict[str, object]:
    """Name -> model config: each family tied and untied, with and without the optional heads."""
    from bertgpt_jax.models.bert import BertConfig
    from bertgpt_jax.models.gpt import GPT1, GptConfig

    post = {name: GPT1[name] for name in ("norm_position", "final_norm", "residual_initializer")}
    roberta = dict(position_offset=2, next_sentence_head=False, norm_eps=1e-5, intermediate_size=80)
    return {
        "bert": BertConfig(**SIZES, intermediate_size=80),
        "bert_untied": BertConfig(**SIZES, intermediate_size=80, tied_head=False, activation="gelu_tanh"),
        "bert_masked": BertConfig(**SIZES, intermediate_size=80, next_sentence_head=False, activation="relu"),
        "bert_no_types": BertConfig(**SIZES, intermediate_size=80, type_vocab_size=0, next_sentence_head=False),
        "roberta": BertConfig(**SIZES, **roberta, type_vocab_size=1),
        "roberta_untied": BertConfig(**SIZES, **roberta, type_vocab_size=0, tied_head=False),
        "gpt2": GptConfig(**SIZES, intermediate_size=80),
        "gpt2_untied": GptConfig(**SIZES, intermediate_size=80, tied_head=False),
        "gpt1": GptConfig(**SIZES, **post, intermediate_size=192),
        "gpt1_untied": GptConfig(**SIZES, **post, intermediate_size=192, tied_head=False),
    }


def random_source(config, seed: int = 0, tokenizer=None):
    """Every parameter random, norms and biases included: zeros and ones would hide a wrong place."""
    from bertgpt_jax.transfer.source import Source, parameter_shapes

    rng, leaves = np.random.default_rng(seed), parameter_shapes(config)
    arrays = {}
    for path, (_, shape) in leaves.items():
        offset = 1.0 if path.endswith("scale") else 0.0
        arrays[path] = (rng.standard_normal(shape) * 0.1 + offset).astype(np.float32)
    return Source(config, tokenizer, leaves, lambda paths: {p: arrays[p] for p in paths}, "random", 7, {})


@pytest.fixture(scope="session")
def configs() -> dict[str, object]:
    return tiny_configs()


@pytest.fixture(scope="session")
def make_source():
    return random_source


@pytest.fixture
def in_process(monkeypatch) -> None:
    """The NumPy reference without a process of its own; `test_export.py` starts the real one."""
    from bertgpt_jax.transfer import proof, reference

    def run(directory, batch, kind, layers):
        assert kind == "numpy"
        return reference.with_numpy(directory, batch, layers)

    monkeypatch.setattr(proof, "run_reference", run)
