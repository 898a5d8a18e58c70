"""What replicas divide and sum: shardings, errors, equal training, errors; ZeRO-1 and accumulation on eight devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bertgpt_jax.config import build
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.parallel import replicas, sharding
from bertgpt_jax.parallel.hlo_text import Computations, in_loops, parse
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.parallel.replicas import Links, spread, sum_of_replicas
from bertgpt_jax.training.run_config import RunConfig, with_changes
from bertgpt_jax.training.setup import lower_train_step, make_program

FAST = {"xla_backend_optimization_level": 0}


def lying(mesh: Mesh, *entries) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*entries))


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.fixture
def all_sizes(monkeypatch):
    """Small parameters are divided too."""
    monkeypatch.setattr(replicas, "SMALL", 0)


@pytest.mark.parametrize(
    ("shape", "entries", "expected"),
    [
        ((12, 768, 3072), ("pipe", "fsdp", "tensor"), ("pipe", ("data",), "tensor")),  # rows, not lanes
        ((12, 768, 12, 64), ("pipe", "fsdp", "tensor", None), ("pipe", ("data",), "tensor", None)),
        (
            (12, 12, 64, 768),
            ("pipe", "tensor", None, "fsdp"),
            ("pipe", "tensor", ("data",), "fsdp"),
        ),  # 12 do not divide
        ((50_257, 768), ("tensor", "fsdp"), ("tensor", ("data",))),  # rows that do not divide
        ((1024, 128), (None, "fsdp"), ("data", "fsdp")),
        ((50_257, 3, 5), (None, None, None), (None, None, None)),  # nothing divides
        ((8, 64), ("pipe", None), ("pipe", None)),  # small
    ],
)
def test_one_more_dimension_is_divided(shape, entries, expected) -> None:
    mesh = make_mesh(MeshConfig(data=8))
    found = spread({"a": leaf(4096, 4096), "b": leaf(*shape)}, {"a": lying(mesh), "b": lying(mesh, *entries)}, mesh)
    got = [e if e not in (("data",),) else "data" for e in found["b"].spec]
    assert got == [e if e not in (("data",),) else "data" for e in expected]


def test_replicas_join_what_already_divides_a_dimension(all_sizes) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    found = spread({"a": leaf(5, 64)}, {"a": lying(mesh, None, "fsdp")}, mesh)
    assert found["a"].spec == PartitionSpec(None, ("fsdp", "data"))


def test_nothing_to_share_is_an_error() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with pytest.raises(ConfigError, match="shard_optimizer.*mesh.data = 1"):
        spread({"a": leaf(4096, 4096)}, {"a": lying(mesh)}, mesh)
    mesh = make_mesh(MeshConfig(data=8))
    with pytest.raises(ConfigError, match="no parameter of 65,536 numbers or more .*= 8 divides"):
        spread({"a": leaf(64, 64)}, {"a": lying(mesh)}, mesh)


def test_the_error_comes_before_anything_is_compiled(runs) -> None:
    config = runs.run_config("gpt", (1, 8, 1))
    config = with_changes(config, {"execution": config.execution.model_dump() | {"shard_optimizer": True}})
    with pytest.raises(ConfigError, match="shard_optimizer"):
        make_program(config, make_mesh(config.execution.mesh))


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_attention_kernels_inside_a_replicas_share(kind: str) -> None:
    """Masks that leave pairs out, and masks that leave none, of rows that a replica computes alone."""
    sizes = dict(vocab_size=64, max_positions=128, num_layers=1, hidden_size=64, num_heads=1, intermediate_size=64)
    family, objective = (GptConfig, CausalLM()) if kind == "gpt" else (BertConfig, MaskedLMNSP())
    stage = dict(steps=1, sequence_length=128, batch_size=4, microbatches=2, schedule=dict(kind="constant", peak=1e-3))
    tree = dict(
        corpus=CorpusConfig(path="unused"), model=family(**sizes, hidden_dropout=0.0, attention_dropout=0.0),
        objective=objective, stages=(stage,),
        execution=dict(mesh=dict(data=2), compute=dict(attention="splash", emulate=True)),
    )  # fmt: skip
    config = build(RunConfig, tree, "test")
    program = make_program(config, make_mesh(config.execution.mesh, jax.devices()[:2]))
    assert "reduce" in lower_train_step(program, config.stages[0]).as_text()


@pytest.mark.parametrize(
    "links", [Links((8,)), Links((2, 4)), Links((2, 2, 2)), Links((2, 4), True), Links((4, 2), True)]
)
@pytest.mark.parametrize("dimension", [0, 1])
def test_parts_of_the_sum_reach_their_replicas(links, dimension, monkeypatch) -> None:
    """Whatever the torus: replica i gets part i."""
    monkeypatch.setattr(replicas, "_links", lambda mesh: links)
    mesh = make_mesh(MeshConfig(data=8))
    rows = np.random.default_rng(0).integers(0, 100, (8, 16, 24)).astype(np.float32)
    lies = lying(mesh, *(None,) * dimension, "data")

    def local(whole, mine):
        return {"g": whole * jnp.sum(mine, 0)}, jnp.sum(mine), ()

    with sharding.mesh_context(mesh):
        compiled = jax.jit(lambda r: sum_of_replicas(local, 2.0, r, {"g": lies})).lower(rows).compile()
    grads, total, _ = compiled(jax.device_put(rows, compiled.input_shardings[0][0]))
    np.testing.assert_array_equal(grads["g"], 2 * rows.sum(0))
    assert float(total) == rows.sum() and grads["g"].sharding.is_equivalent_to(lies, 2)


class Chip:
    """A device with a place."""

    def __init__(self, *coords: int, slice_index: int = 0):
        self.coords, self.slice_index = coords, slice_index


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([Chip(x, y, 0) for y in range(2) for x in range(4)], Links((2, 4))),
        ([Chip(x, y, 0) for x in range(2) for y in range(4)], Links((2, 4))),
        ([Chip(x, 0, 0, slice_index=s) for s in range(2) for x in range(4)], Links((2, 4), True)),
        ([Chip(0, 0, x) for x in range(8)], Links((8,))),
        ([Chip(x, x, 0) for x in range(8)], Links((8,))),  # no torus
        ([object()] * 8, Links((8,))),
    ],
    ids=["rows", "columns", "slices", "line", "diagonal", "unknown"],
)
def test_links_are_read_off_coordinates(devices, expected) -> None:
    class FakeMesh:
        axis_names = ("data", "tensor")

    FakeMesh.devices = np.array(devices, object).reshape(8, 1)
    assert replicas._links(FakeMesh) == expected


# ---------------------------------------------------------------- training


def trained(runs, kind: str, shape: tuple[int, int, int], steps: int = 2, microbatches: int = 2, **execution):
    """(losses and gradient norms, bytes of the optimizer's state on a device, parameters, the compiled program)."""
    config = runs.run_config(kind, shape, layers=1)
    stages = [config.stages[0].model_dump(mode="json") | {"microbatches": microbatches}]
    tree = config.execution.model_dump(mode="json") | execution
    config = with_changes(config, {"execution": tree, "stages": stages})
    mesh = make_mesh(config.execution.mesh, jax.devices()[: int(np.prod(shape))])
    program = make_program(config, mesh)
    step = lower_train_step(program, config.stages[0]).compile(compiler_options=FAST)
    state, rows = program.init(), []
    for number in range(steps):
        batch = sharding.place_batch(runs.batch_of(config, number), mesh, runs.ROWS)
        state, metrics = step(state, batch)
        rows.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state["optimizer"]))
    return np.array(rows), held, jax.tree.map(np.asarray, state["params"]), parse(step.as_text())[0]


@pytest.mark.slow
def test_accumulation_exchanges_once(runs) -> None:
    """Also where gradients are summed whole; replicas of sharded parameters sum over what they repeat only."""
    whole = trained(runs, "gpt", (8, 1, 1))
    assert exchanges(whole[3], in_loops(whole[3])) == []
    compare(trained(runs, "gpt", (1, 1, 1)), whole)


def compare(one, other) -> None:
    np.testing.assert_allclose(other[0], one[0], rtol=2e-6)
    for mine, theirs in zip(jax.tree.leaves(one[2]), jax.tree.leaves(other[2]), strict=True):
        np.testing.assert_allclose(theirs, mine, atol=2e-5)


def exchanges(program: Computations, computations) -> list[str]:
    """Collectives in some computations."""
    return [line.collective for name in computations for line in program[name] if line.collective]


def test_a_shared_optimizer_trains_the_same(runs, all_sizes) -> None:
    """Dropout is on, two microbatches: the losses, the parameters; an eighth of the moments, but for odd shapes.

    Nothing is exchanged while the microbatches add up.
    """
    one, shared = trained(runs, "gpt", (1, 1, 1)), trained(runs, "gpt", (8, 1, 1), shard_optimizer=True)
    compare(one, shared)
    assert shared[1] < one[1] / 6
    assert exchanges(shared[3], in_loops(shared[3])) == []
    assert {"reduce-scatter", "all-gather"} <= set(exchanges(shared[3], shared[3]))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["gpt", "bert"])
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_shared_optimizer_trains_the_same_on_every_mesh(runs, all_sizes, kind, shape, microbatches) -> None:
    one = trained(runs, kind, (1, 1, 1), microbatches=microbatches)
    shared = trained(runs, kind, shape, microbatches=microbatches, shard_optimizer=True)
    compare(one, shared)
    assert shared[1] < one[1] / np.prod(shape) * 1.5


def test_a_mesh_that_is_not_there_is_no_replica() -> None:
    assert replicas.replicas() == 1
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        assert replicas.replicas() == 2
