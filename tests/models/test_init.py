"""Published sizes by parameter count, and the statistics of fresh parameters."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.models import bert, gpt, make_model
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.parallel.sharding import flatten


def init(config):
    ids = jnp.zeros((1, 8), jnp.int32)
    model = make_model(config, ComputeConfig(unroll_layers=False))
    inputs = (ids, ids, None, AttentionMask(), ids) if config.kind == "bert" else (ids, ids, AttentionMask())
    return lambda: nn.unbox(model.init(jax.random.key(0), *inputs)["params"])


ROBERTA = dict(max_positions=512, position_offset=2, type_vocab_size=0, next_sentence_head=False)
COUNTS = {
    # transformers BertForPreTraining of bert-base-uncased and bert-large-uncased (paper: 110M, 340M)
    "bert base": (BertConfig(vocab_size=30522, **bert.SIZES["base"]), 110_106_428),
    "bert large": (BertConfig(vocab_size=30522, **bert.SIZES["large"]), 336_226_108),
    # transformers RobertaForMaskedLM of roberta-base, 124,697,433, less its one row of types
    "roberta base": (BertConfig(vocab_size=50265, **ROBERTA, **bert.SIZES["base"]), 124_697_433 - 768),
    # transformers GPT2LMHeadModel of gpt2, gpt2-medium, gpt2-large, gpt2-xl
    "gpt2": (GptConfig(vocab_size=50257, **gpt.SIZES["gpt2"]), 124_439_808),
    "gpt2 medium": (GptConfig(vocab_size=50257, **gpt.SIZES["gpt2_medium"]), 354_823_168),
    "gpt2 large": (GptConfig(vocab_size=50257, **gpt.SIZES["gpt2_large"]), 774_030_080),
    "gpt2 xl": (GptConfig(vocab_size=50257, **gpt.SIZES["gpt2_xl"]), 1_557_611_200),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_published_sizes(name: str) -> None:
    config, expected = COUNTS[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init(config)))) == expected


def fresh(config) -> dict[str, np.ndarray]:
    params = jax.jit(init(config), compiler_options={"xla_backend_optimization_level": 0})()
    return {name: np.asarray(leaf) for name, leaf in flatten(params).items()}


def is_std(values: np.ndarray, expected: float) -> bool:
    """Within five standard errors (of a normal: the truncated one's is smaller)."""
    return abs(values.std() / expected - 1) < 5 / np.sqrt(2 * values.size) and abs(
        values.mean()
    ) < 5 * expected / np.sqrt(values.size)


SMALL = dict(vocab_size=211, max_positions=64, num_layers=3, hidden_size=64, num_heads=4, intermediate_size=128)


def test_bert_starts_truncated_normal() -> None:
    for name, leaf in fresh(BertConfig(**SMALL)).items():
        if name.endswith(("kernel", "table")):
            assert np.abs(leaf).max() <= 0.04, "cut at two standard deviations"
            assert is_std(leaf, 0.02 * 0.87962566), name  # the standard deviation that is left after the cut
        else:
            assert np.all(leaf == (1.0 if name.endswith("scale") else 0.0)), name


def test_gpt_scales_residual_projections_by_depth() -> None:
    """openai/gpt-2 src/model.py: wte .02, wpe .01; paper section 2.3: residual layers scaled by 1/sqrt(N)."""
    for name, leaf in fresh(GptConfig(**SMALL)).items():
        if name.endswith(("attention/output/kernel", "feed_forward/down/kernel")):
            assert leaf.shape[0] == 3 and is_std(leaf, 0.02 / np.sqrt(2 * 3)), name
        elif name == "position_embedding/table":
            assert is_std(leaf, 0.01)
        elif name.endswith(("kernel", "table")):
            assert is_std(leaf, 0.02), name
            assert np.abs(leaf).max() > 0.05, "not truncated"
        else:
            assert np.all(leaf == (1.0 if name.endswith("scale") else 0.0)), name


def test_bert_does_not_scale_by_depth_unless_asked() -> None:
    leaves = fresh(BertConfig(**SMALL, residual_initializer="depth_scaled"))
    assert is_std(leaves["layers/feed_forward/down/kernel"], 0.02 * 0.87962566 / np.sqrt(6))
    assert is_std(leaves["layers/feed_forward/up/kernel"], 0.02 * 0.87962566)
