"""Train steps compiled for an H200 that is not here: fused attention in every layer, no more memory than it was.

Predicted for GPT-2 124M and 64 rows of 1,024 were 30.9 GiB beside the state, 21.3 with the loss in chunks.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from bertgpt_jax.batches.packing import PackedDocuments, PackedPairs
from bertgpt_jax.config import build
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import SIZES, GptConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.planning.compiled import Compiled, compile_step
from bertgpt_jax.planning.places import parse
from bertgpt_jax.training.run_config import RunConfig

pytestmark = [
    pytest.mark.gpu_aot,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13, 14)),
        reason="the CUDA plugin is not installed: pip install 'bertgpt_jax[cuda]'",
    ),
]
GIB = 2**30
SMALL = dict(num_layers=2, hidden_size=256, num_heads=4, intermediate_size=1024, vocab_size=8192)
PACKED = CausalLM(examples=PackedDocuments(max_segments=16))


def compiled(model: Any, objective: Any, length: int, rows: int, place: str = "h200:1", **compute: Any) -> Compiled:
    """The step of one stage, AdamW in it, without dropout."""
    tree = dict(
        corpus=CorpusConfig(path="unused"),
        model=model.model_copy(update=dict(hidden_dropout=0.0, attention_dropout=0.0)),
        objective=objective,
        stages=(
            dict(steps=10, sequence_length=length, batch_size=rows, schedule=dict(kind="constant", peak=1e-4)),
        ),
        execution=dict(compute=dict(dtype="bfloat16") | compute),
    )  # fmt: skip
    return compile_step(build(RunConfig, tree, "test"), parse(place))


@pytest.mark.parametrize("place", ["h200:1", "h200:8"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_attention_is_fused_in_every_layer(packed: bool, place: str) -> None:
    model = GptConfig(**SMALL, max_positions=512)
    found = compiled(model, PACKED if packed else CausalLM(), 512, 16, place, attention="cudnn")
    assert found.attention == (2, 2) and found.fits


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_attention_of_pairs_is_fused_on_eight(packed: bool) -> None:
    """Rows lie on eight chips, and so do their lengths or their segments."""
    objective = MaskedLMNSP(examples=PackedPairs()) if packed else MaskedLMNSP()
    model = BertConfig(**SMALL, max_positions=128)
    found = compiled(model, objective, 128, 64, "h200:8", attention="cudnn")
    assert found.attention == (2, 2)
    assert not [one for one in found.collectives if one.kind == "all-gather"], found.collectives


@pytest.mark.parametrize(
    ("unroll", "place"),
    [(False, "h200:8"), pytest.param(True, "h200:1", marks=pytest.mark.slow)],
    ids=["scanned on 8", "unrolled"],
)
def test_every_linear_map_multiplies_8_bits(unroll: bool, place: str) -> None:
    """Forward, and in both of its gradients: query, key, value, output, up and down."""
    model = GptConfig(**SMALL, max_positions=512)
    found = compiled(model, CausalLM(), 512, 16, place, matmul="fp8", unroll_layers=unroll)
    assert found.fp8 == 6 * 3 * (model.num_layers if unroll else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "compute", "seen"),
    [
        (CausalLM(), {}, 26.4),
        (CausalLM(), {"head_chunk": 128}, 15.9),
        (PACKED, {}, 26.9),
    ],
    ids=["whole", "loss in chunks", "packed"],
)
def test_gpt2_small_needs_no_more_memory(objective: CausalLM, compute: dict[str, Any], seen: float) -> None:
    """64 rows of 1,024, activation functions recomputed; GiB beside the state as seen with jax 0.11.2."""
    model = GptConfig(**SIZES["gpt2"], vocab_size=50_257)
    found = compiled(model, objective, 1024, 64, remat="gelu", **compute)
    assert found.attention == (12, 12)
    assert found.temporaries / GIB < 1.05 * seen
