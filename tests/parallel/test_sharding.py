"""Shardings of parameters, states and batches, and the errors of what a mesh does not divide."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.parallel import sharding
from bertgpt_jax.parallel.axes import LOGICAL_AXES
from bertgpt_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from bertgpt_jax.training.optim import Adafactor, AdamW, BertAdam, Lamb, Lion, Muon
from bertgpt_jax.training.run_config import with_changes
from bertgpt_jax.training.setup import make_program


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1):
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


def changed(runs, mesh: tuple, **model):
    config = runs.run_config("gpt", mesh)
    return with_changes(config, {"model": config.model.model_dump(mode="json") | model})


@pytest.mark.parametrize(
    ("mesh", "model", "words"),
    [
        ((4, 1, 2), dict(vocab_size=33), ["token_embedding/table", "'vocab' of size 33", "tensor = 2", "34"]),
        ((2, 1, 4), dict(num_heads=2), ["attention", "'heads' of size 2", "tensor = 4"]),
        ((1, 8, 1), dict(hidden_size=12, num_heads=2), ["'embed' of size 12", "fsdp = 8", "16"]),
        ((4, 1, 2), dict(intermediate_size=31), ["feed_forward", "'mlp' of size 31", "tensor = 2", "32"]),
    ],
)
def test_an_axis_that_does_not_divide_is_named(runs, mesh: tuple, model: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        make_program(changed(runs, mesh, **model), mesh_of(*mesh))
    message = str(refusal.value)
    assert all(word in message for word in words) and "\n" not in message


def test_batches_must_divide_over_rows_and_microbatches() -> None:
    mesh = mesh_of(2, 2, 2)
    sharding.check_batch(8, 2, mesh, "stages.a")
    with pytest.raises(ConfigError, match=r"stages.a.batch_size 12 .* data\*fsdp\*microbatches = 8; use 8 or 16"):
        sharding.check_batch(12, 2, mesh, "stages.a")
    with pytest.raises(ConfigError, match="batch_size 3 .* = 4; use 4"):
        sharding.check_batch(3, 1, mesh, "stages.a")


def test_the_table_names_mesh_axes_that_exist() -> None:
    names = [name for name, _ in LOGICAL_AXES]
    assert len(names) == len(set(names))
    for _, axes in LOGICAL_AXES:
        assert {axes} <= set(AXES) | {None} if not isinstance(axes, tuple) else set(axes) <= set(AXES)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_one_process_holds_and_places_all_rows(mesh: tuple) -> None:
    mesh = mesh_of(*mesh)
    rows = sharding.local_rows(mesh, 16)
    assert rows.tolist() == list(range(16))
    batch = {"tokens": np.arange(48, dtype=np.int32).reshape(16, 3), "weights": np.ones(16, np.float32)}
    placed = sharding.place_batch(batch, mesh, 16)
    for name, array in batch.items():
        assert placed[name].dtype == array.dtype and np.array_equal(placed[name], array)
        assert placed[name].sharding.is_equivalent_to(sharding.batch_sharding(mesh), array.ndim)
    for shard in placed["tokens"].addressable_shards:
        assert np.array_equal(shard.data, batch["tokens"][shard.index])


def test_bytes_per_device_by_hand() -> None:
    mesh = mesh_of(2, 2, 2)
    abstract = {
        "split": jax.ShapeDtypeStruct((8, 6), jnp.float32), "whole": jax.ShapeDtypeStruct((5,), jnp.int32),
        "half": jax.ShapeDtypeStruct((4, 4), jnp.bfloat16),
    }  # fmt: skip
    where = {
        "split": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")), "whole": NamedSharding(mesh, PartitionSpec()),
        "half": NamedSharding(mesh, PartitionSpec(("data", "fsdp"))),
    }  # fmt: skip
    assert sharding.bytes_per_device(abstract, where) == 4 * 3 * 4 + 5 * 4 + 1 * 4 * 2


@pytest.mark.parametrize("optimizer", [AdamW(), BertAdam(), Lamb(), Lion(), Muon(), Adafactor()], ids=lambda o: o.kind)
def test_no_optimizer_state_of_a_parameters_shape_is_replicated(runs, optimizer) -> None:
    config = runs.run_config("gpt", (1, 8, 1))
    stage = config.stages[0].model_dump(mode="json") | {"optimizer": optimizer.model_dump(mode="json")}
    program = make_program(with_changes(config, {"stages": [stage]}), mesh_of(1, 8, 1))
    flat = sharding.flatten(program.abstract_state)
    shapes = {name.removeprefix("params/"): leaf for name, leaf in flat.items() if name.startswith("params/")}
    mirrored = 0
    for name, leaf in flat.items():
        for parameter, mine in shapes.items():
            if name.startswith("optimizer/") and name.endswith("/" + parameter) and leaf.shape == mine.shape:
                assert leaf.sharding == mine.sharding, name
                mirrored += 1
    assert mirrored >= len(shapes)


def test_init_is_the_same_on_every_mesh_and_lies_where_it_should(runs) -> None:
    states = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        program = make_program(runs.run_config("gpt", shape), mesh_of(*shape))
        state = program.init()
        for name, leaf in sharding.flatten(state).items():
            assert leaf.sharding == sharding.flatten(program.abstract_state)[name].sharding, name
        states.append(jax.tree.map(np.asarray, state))
    for one, other in zip(*(jax.tree.leaves(state) for state in states), strict=True):
        np.testing.assert_array_equal(one, other)
