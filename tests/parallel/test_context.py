"""Sequences split over devices: the same losses and gradients as on one, whatever the form, the order and the mesh."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.packing import PackedDocuments, PackedPairs
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.corpus.view import InMemoryCorpus
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.parallel import context, sharding
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.schedules import Constant
from bertgpt_jax.training.setup import lower_eval_step, lower_train_step, make_program

pytestmark = pytest.mark.usefixtures("with_the_cache")

FAST_COMPILE = {"xla_backend_optimization_level": 0}
T, ROWS, V, STEPS = 32, 8, 32, 2
SIZES = dict(vocab_size=V, max_positions=T, num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32)
OBJECTIVES = {
    "gpt": CausalLM(),
    "bert": MaskedLMNSP(),
    "packed gpt": CausalLM(examples=PackedDocuments()),
    "packed bert": MaskedLMNSP(examples=PackedPairs(max_segments=4)),
}


def run_config(kind: str, mesh: dict[str, int], attention_dropout: float = 0.0, microbatches: int = 1, **compute):
    """Dropout of hidden states is on."""
    model = GptConfig if "gpt" in kind else BertConfig
    stage = StageConfig(
        steps=STEPS, sequence_length=T, batch_size=ROWS, microbatches=microbatches, schedule=Constant(peak=1e-3)
    )
    execution = ExecutionConfig(
        mesh=MeshConfig(**{"data": 1} | mesh), compute=ComputeConfig(**{"unroll_layers": False} | compute)
    )
    return RunConfig(
        corpus=CorpusConfig(path="unused"),
        model=model(**SIZES, attention_dropout=attention_dropout),
        objective=OBJECTIVES[kind],
        stages=(stage,),
        execution=execution,
    )


@functools.cache
def data(kind: str) -> Dataset:
    rng = np.random.default_rng(0)
    documents = [[rng.integers(6, V, n).tolist() for n in rng.integers(1, 6, rng.integers(2, 5))] for _ in range(150)]
    objective = OBJECTIVES[kind]
    return Dataset(
        InMemoryCorpus(documents, V), objective.examples, objective.masking, sequence_length=T, batch_size=ROWS
    )


def program_of(config: RunConfig):
    sizes = config.execution.mesh
    count = sizes.data * sizes.fsdp * sizes.pipe * sizes.context * sizes.tensor
    return make_program(config, make_mesh(sizes, jax.devices()[:count]))


def train(kind: str, mesh: dict[str, int], **settings) -> list[dict[str, float]]:
    """Metrics of every step, and at last an evaluation: the mean of each part, and how many it got right."""
    program = program_of(run_config(kind, mesh, **settings))
    stage = program.config.stages[0]
    step = lower_train_step(program, stage).compile(FAST_COMPILE)
    state, found = program.init(), []
    for n in range(STEPS):
        rows = data(kind).batch(n, sharding.local_rows(program.mesh, ROWS))
        batch = sharding.place_batch(rows, program.mesh, ROWS)
        assert all(np.array_equal(batch[name], rows[name]) for name in rows), "the same data on every mesh"
        state, metrics = step(state, batch)
        found.append({name: float(value) for name, value in metrics.items()})
    sums, metrics, weights = lower_eval_step(program, stage).compile(FAST_COMPILE)(state["params"], batch)
    means = {name: value / weights[name] for name, value in sums.items()}
    return [*found, {name: float(value) for name, value in (means | metrics).items()}]


@functools.cache
def alone(kind: str, attention_dropout: float, microbatches: int) -> list[dict[str, float]]:
    return train(kind, {}, attention_dropout=attention_dropout, microbatches=microbatches)


def check(kind: str, mesh: dict[str, int], **settings) -> None:
    drawn = {"attention_dropout": 0.0, "microbatches": 1} | settings
    want = alone(kind, drawn["attention_dropout"], drawn["microbatches"])
    assert want[0]["loss"] != want[1]["loss"]
    for one, other in zip(want, train(kind, mesh, **settings), strict=True):
        differences = {name: abs(one[name] - other[name]) for name in one}
        print({name: f"{difference:.1e}" for name, difference in differences.items() if difference})
        assert max(differences.values()) <= 1e-5, differences


CASES = [
    ("gpt", dict(context=8), {}),
    ("gpt", dict(fsdp=2, context=2, tensor=2), dict(microbatches=2)),
    ("bert", dict(context=8), {}),
    ("packed gpt", dict(data=2, context=4), dict(remat="full", head_chunk=8)),
    ("gpt", dict(context=4), {}),
    ("gpt", dict(context=8), dict(context_attention="all_gather")),
    ("gpt", dict(data=2, context=4), dict(zigzag=False)),
    ("gpt", dict(pipe=2, context=2, tensor=2), {}),
    ("bert", dict(context=2), dict(context_attention="all_gather")),
    ("bert", dict(data=2, pipe=2, context=2), {}),
    ("bert", dict(data=2, context=4), dict(attention_dropout=0.1, head_chunk=5)),
    ("packed gpt", dict(context=2, tensor=2), dict(attention_dropout=0.1)),
    ("packed bert", dict(fsdp=2, context=2, tensor=2), {}),
]
"""The first four are slow, the others long."""


def test_steps_equal_one_devices() -> None:
    """A ring in zigzag order."""
    check("gpt", dict(context=2, tensor=2))


@pytest.mark.parametrize(
    ("kind", "mesh", "settings"),
    [pytest.param(*case, marks=pytest.mark.slow if i < 4 else pytest.mark.long) for i, case in enumerate(CASES)],
    ids=str,
)
def test_steps_in_every_form_equal_one_devices(kind: str, mesh: dict[str, int], settings: dict) -> None:
    """Causal ones in zigzag order but where it is off; with dropout of attention, keys are gathered."""
    check(kind, mesh, **settings)


def test_batches_lie_in_parts() -> None:
    program = program_of(run_config("packed bert", dict(data=2, context=4)))
    abstract = program.abstract_batch(program.config.stages[0])
    rows = data("packed bert").batch(0, sharding.local_rows(program.mesh, ROWS))
    placed = sharding.place_batch(rows, program.mesh, ROWS)
    for name, array in placed.items():
        assert array.sharding == abstract[name].sharding, name
        along = array.ndim > 1 and array.shape[1] == T
        assert array.sharding.shard_shape(array.shape)[:2] == ((4, T // 4) if along else (4, *array.shape[1:2])), name
        np.testing.assert_array_equal(array, rows[name])


@pytest.mark.parametrize(
    ("kind", "mesh", "compute", "message"),
    [
        ("gpt", dict(context=5), {}, r"sequence_length 32 .* twice mesh.context \(.*zigzag\) = 10; use 30 or 40"),
        ("bert", dict(context=5), {}, r"sequence_length 32 .* mesh.context = 5; use 30 or 35"),
        ("gpt", dict(context=6), dict(zigzag=False), r"stages.pretrain: sequence_length 32 .* = 6; use 30 or 36"),
        ("bert", dict(context=2), dict(zigzag=True), "zigzag = true: only causal models"),
    ],
)
def test_refusals(kind: str, mesh: dict, compute: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        program_of(run_config(kind, mesh, **compute))
    assert "\n" not in str(refusal.value) and refusal.value.exit_code == 78


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(context_attention="ring", attention_dropout=0.1), ["'ring' cannot serve", "model.attention_dropout=0"]),
        (
            dict(attention="cudnn", platform="gpu", dtype="bfloat16"),
            ["'cudnn' cannot serve", "splits the sequence into 2"],
        ),
        (dict(attention="splash", platform="tpu"), ["'splash' cannot serve", "not multiples of 128"]),
        (dict(head_chunk=1), ["head_chunk = 1", "the 2 shards", "use one of 2, 4, 8, 16, 32"]),
    ],
    ids=str,
)
def test_what_a_split_sequence_cannot_have(settings: dict, words: list[str]) -> None:
    """Said while the step is traced, before anything is compiled."""
    config = run_config("gpt", dict(context=2), **settings)
    with pytest.raises(ConfigError) as refusal:
        lower_train_step(program_of(config), config.stages[0])
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_length_that_divides_passes() -> None:
    mesh = make_mesh(MeshConfig(data=1, context=8))
    context.check_length(48, True, mesh, "x")
    with pytest.raises(ConfigError, match="use 48 or 64"):
        context.check_length(56, True, mesh, "x")
    context.check_length(56, False, mesh, "x")
