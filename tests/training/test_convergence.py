"""Learning curves: what makes a step cheaper leaves them where they were, on three seeds, for BERT and GPT."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bertgpt_jax.config import load_config, to_json
from bertgpt_jax.corpus.builder import open_corpus
from bertgpt_jax.corpus.config import CharactersConfig, CorpusConfig, HashSplit, PositionSplit, WordPieceConfig
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.parallel import replicas
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.parallel.sharding import place_batch
from bertgpt_jax.training import setup
from bertgpt_jax.training.run_config import RunConfig, StageConfig, with_changes, with_steps, with_vocabulary
from bertgpt_jax.training.schedules import Linear

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:Sharding info not provided")]

SEEDS = (0, 1, 2)
STEPS = 150
LAST = 30
"""Steps whose mean loss ends a curve."""

TECHNIQUES = {
    "head_chunk": ("execution.compute.head_chunk=1",),  # divides BERT's few predictions too
    "remat_gelu": ("execution.compute.remat=gelu",),
    "remat_dots": ("execution.compute.remat=dots",),
    "remat_full": ("execution.compute.remat=full",),
    "offloaded": ("execution.compute.remat=offload",),
    "scanned": ("execution.compute.unroll_layers=false", "execution.compute.remat=dots"),
    "microbatches": ("stages.0.microbatches=4",),
    "zero_1": ("execution.shard_optimizer=true",),
    "padded_vocabulary": ("model.vocab_multiple=128",),
    "bfloat16": ("execution.compute.dtype=bfloat16",),
    "moments_in_bfloat16": ("stages.0.optimizer.first_moment=bfloat16", "stages.0.optimizer.second_moment=bfloat16"),
    "moments_factored": ("stages.0.optimizer.second_moment=factored",),
}
"""Packed rows and splash need other shapes: benchmark `convergence` has them, on real text."""


def words_of(path: Path) -> str:
    """Sentences of a little grammar: what comes next depends on the words before, so that there is much to learn."""
    rng = np.random.default_rng(0)
    animals, deeds, places = ("cat", "dog", "bird", "fish"), ("saw", "chased", "ate", "missed"), ("wall", "tree", "sea")
    lines = []
    for _ in range(4000):
        who, whom = rng.integers(0, 4, 2)
        lines.append(f"the {animals[who]} {deeds[(who + whom) % 4]} the {animals[whom]} by the {places[who % 3]}.")
        if rng.random() < 0.1:
            lines.append("")
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory):
    """(kind, overrides, steps) -> last mean losses of three seeds, each with its own start and batches."""
    root = tmp_path_factory.mktemp("curves")
    size = dict(
        num_layers=2, hidden_size=48, num_heads=2, intermediate_size=192, hidden_dropout=0.0, attention_dropout=0.0
    )
    text = words_of(root / "text.txt")
    shape = dict(name="only", sequence_length=32, batch_size=16)
    character = CorpusConfig(
        path=text, format="file", sentences="none", held_out=PositionSplit(fraction=0.1), tokenizer=CharactersConfig(),
        workers=0,
    )  # fmt: skip
    pieces = CorpusConfig(
        path=text,
        sentences="line",
        held_out=HashSplit(fraction=0.1),
        tokenizer=WordPieceConfig(vocab_size=60),
        workers=0,
    )
    models: dict[str, dict[str, Any]] = {
        "gpt": dict(corpus=character, model=GptConfig(**size, max_positions=32), objective=CausalLM()),
        "bert": dict(corpus=pieces, model=BertConfig(**size, max_positions=32), objective=MaskedLMNSP()),
    }

    @cache
    def prepared(kind: str, seed: int, steps: int):
        # a long run at the short one's rate would compare precisions by where chaos took it
        schedule = Linear(peak=5e-3 if steps == STEPS else 1e-3, warmup_steps=20)
        config = RunConfig(seed=seed, **models[kind], stages=(StageConfig(**shape, steps=steps, schedule=schedule),))
        corpus = open_corpus(config.corpus, root, progress=False)
        config = with_vocabulary(config, corpus.vocab_size)
        train, _ = setup.make_datasets(config, corpus, root)[0]
        config = with_steps(config, [train.rows_per_epoch])
        return config, [train.batch(n, np.arange(16)) for n in range(steps)]

    @cache
    def ends(kind: str, overrides: tuple[str, ...], steps: int = STEPS) -> np.ndarray:
        (root / "config.json").write_text(to_json(prepared(kind, SEEDS[0], steps)[0]))
        config = load_config(str(root / "config.json"), RunConfig, list(overrides))
        mesh = make_mesh(MeshConfig(), jax.devices()[: 2 if config.execution.shard_optimizer else 1])
        step = setup.lower_train_step(setup.make_program(config, mesh), config.stages[0]).compile()
        found = []
        for seed in SEEDS:
            state = setup.make_program(with_changes(config, {"seed": seed}), mesh).init()
            losses = []
            for batch in prepared(kind, seed, steps)[1]:
                state, metrics = step(state, place_batch(batch, mesh, 16))
                losses.append(metrics["loss"])
            losses = np.array(jax.device_get(losses))
            assert losses[-LAST:].mean() < 0.75 * losses[:5].mean(), "it learns"
            found.append(losses[-LAST:].mean())
        return np.array(found)

    return ends


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_curves_end_where_they_did(curves, kind: str, technique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over seeds moves by less than seeds differ among themselves (a standard deviation)."""
    monkeypatch.setattr(replicas, "SMALL", 0)
    plain, changed = curves(kind, ()), curves(kind, TECHNIQUES[technique])
    noise = plain.std(ddof=1)
    assert noise < 0.1 * plain.mean(), "else nothing would be shown"
    assert np.abs(changed.mean() - plain.mean()) < noise, (plain, changed)


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_bfloat16_after_500_steps(curves, kind: str) -> None:
    plain, half = (curves(kind, o, 500).mean() for o in ((), ("execution.compute.dtype=bfloat16",)))
    assert abs(half / plain - 1) < 0.005, (plain, half)


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_8_bit_products_cost_at_most_three_per_cent(curves, kind: str) -> None:
    fp8 = "execution.compute.matmul=fp8", "execution.compute.emulate=true"
    plain, eight = curves(kind, ()).mean(), curves(kind, fp8).mean()
    assert plain != eight and abs(eight / plain - 1) < 0.03, (plain, eight)
