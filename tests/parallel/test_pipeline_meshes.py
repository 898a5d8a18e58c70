"""Pipelines on meshes of eight devices: the run of one device, permutations between neighbours, one order of layers."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from bertgpt_jax.commands import launch_local
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.parallel import sharding
from bertgpt_jax.parallel.mesh import make_mesh
from bertgpt_jax.parallel.topology import describe as describe_topology
from bertgpt_jax.planning.hlo import collectives
from bertgpt_jax.training.checkpoint import Checkpoints, restore
from bertgpt_jax.training.dry_run import describe
from bertgpt_jax.training.setup import check_batches, lower_train_step, make_program

pytestmark = pytest.mark.usefixtures("with_the_cache")

PROGRAM = Path(__file__).with_name("pipe_runs.py")
CIRCULAR = {"schedule": "circular"}
CASES = {
    "pipe 8": ({"pipe": 8}, {}, {}),
    "data, pipe 4": ({"data": 2, "pipe": 4}, {}, {}),
    "fsdp, pipe, tensor": ({"fsdp": 2, "pipe": 2, "tensor": 2}, {}, {}),
    "pipe, context, tensor": ({"pipe": 2, "context": 2, "tensor": 2}, {}, {"remat": "full"}),
    "data, pipe circular, context": ({"data": 2, "pipe": 2, "context": 2}, CIRCULAR, {}),
    "fsdp 4, pipe circular": ({"fsdp": 4, "pipe": 2}, CIRCULAR | {"repeats": 4}, {}),
    "data, fsdp, pipe, two parts": ({"data": 2, "fsdp": 2, "pipe": 2}, {"microbatches": 2}, {"microbatches": 2}),
    "pipe 4 circular, tensor": ({"pipe": 4, "tensor": 2}, CIRCULAR, {"remat": "dots"}),
    "pipe, context 4": ({"pipe": 2, "context": 4}, {}, {}),
    "fsdp, pipe 4 recomputed": ({"fsdp": 2, "pipe": 4}, {"remat": True}, {"head_chunk": None}),
    "data, pipe circular, tensor": ({"data": 2, "pipe": 2, "tensor": 2}, CIRCULAR | {"microbatches": 2}, {}),
}
"""(mesh, pipeline, microbatches and how it is computed)."""


@pytest.fixture(scope="module")
def pipes():
    """The module `pipe_runs`."""
    spec = importlib.util.spec_from_file_location("pipe_runs", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.alone = functools.cache(lambda kind, parts: module.train(module.run_config(kind, {}, {}, parts)))
    return module


WHEN = {
    ("gpt", "fsdp, pipe, tensor"): (),
    ("bert", "data, pipe circular, context"): pytest.mark.slow,
    ("gpt", "data, fsdp, pipe, two parts"): pytest.mark.slow,
    ("bert", "pipe 4 circular, tensor"): pytest.mark.slow,
}
"""The others are long."""


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, case, marks=WHEN.get((kind, case), pytest.mark.long), id=f"{kind}: {case}")
        for kind in ("gpt", "bert")
        for case in CASES
    ],
)
def test_losses_and_gradients_are_one_devices(pipes, kind: str, case: str) -> None:
    """Dropout is on: a microbatch in a stage drops what its rows drop in the whole batch."""
    mesh, pipeline, compute = CASES[case]
    found = pipes.train(pipes.run_config(kind, mesh, pipeline, **compute))
    expected = pipes.alone(kind, compute.get("microbatches", 1))
    assert expected[0] != expected[1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [{}, CIRCULAR], ids=["gpipe", "circular"])
def test_turns_send_to_neighbours_only(pipes, pipeline: dict) -> None:
    """What a loop sends along the stages are permutations; a circular view of the layers is made once, before it."""
    config = pipes.run_config("gpt", {"pipe": 4}, pipeline)
    program = pipes.program_of(config)
    text = lower_train_step(program, config.stages[0]).compile(pipes.FAST_COMPILE).as_text()
    found = collectives(text, program.mesh.shape)
    turns = program.model.pipeline.iterations(program.model.pipeline.microbatches(pipes.ROWS))
    sent = {c.kind for c in found if c.count >= turns and c.kind != "all-to-all"}
    assert sent == {"collective-permute"}, found
    assert {c.axes for c in found} == {("pipe",)}
    assert any(c.kind == "all-to-all" for c in found) is bool(pipeline)
    assert not any(c.kind in ("all-gather", "reduce-scatter") for c in found), found


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "circular"])
def test_a_checkpoint_of_stages_is_one_of_the_model(pipes, schedule: str, tmp_path: Path) -> None:
    """Layers are stored in the model's order: restored on one device, bit for bit, and trained on alike."""
    config, alone = pipes.run_config("gpt", {"pipe": 4}, {"schedule": schedule}), pipes.run_config("gpt", {}, {})
    states = []
    for one in (config, alone):
        program = pipes.program_of(one)
        step = lower_train_step(program, one.stages[0]).compile(pipes.FAST_COMPILE)
        if not states:
            first = sharding.place_batch(pipes.batch_of(one, 0), program.mesh, pipes.ROWS)
            state, _ = step(program.init(), first)
            checkpoints = Checkpoints(epath.Path(tmp_path), 1)
            checkpoints.save(state, 1, {"metrics": {}})
            checkpoints.wait()
            checkpoints.close()
            saved = jax.tree.map(np.asarray, state)
        else:
            state, _ = restore(epath.Path(tmp_path), program.abstract_state, 1)
            for before, after in zip(jax.tree.leaves(saved), jax.tree.leaves(state), strict=True):
                np.testing.assert_array_equal(before, after)
        second = sharding.place_batch(pipes.batch_of(one, 1), program.mesh, pipes.ROWS)
        states.append(jax.tree.map(np.asarray, step(state, second)[0]))
    for one, other in zip(*(jax.tree.leaves(state["params"]) for state in states), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


STAGES = {"data": 2, "pipe": 2, "tensor": 2}
SHARDS = {"fsdp": 2, "context": 2, "tensor": 2}
IN_CI = [("gpt", 2, STAGES), ("bert", 4, SHARDS)]


@pytest.mark.parametrize(
    ("kind", "processes", "mesh"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case in IN_CI else pytest.mark.long)
        for case in itertools.product(("gpt", "bert"), (2, 4), (STAGES, SHARDS))
    ],
    ids=str,
)
def test_several_processes(pipes, kind: str, processes: int, mesh: dict[str, int], capfd, monkeypatch) -> None:
    """Two of four devices, or four of two: all say what one device says."""
    monkeypatch.setenv("PYTHONPATH", str(PROGRAM.parents[2]))
    devices, settings = 8 // processes, json.dumps([mesh, {}])
    command = [sys.executable, str(PROGRAM), kind, settings]
    launched = ["-n", str(processes), "--devices", str(devices), "--", *command]
    assert launch_local.main(launched) == 0, capfd.readouterr()
    said = [line.partition("] ")[2] for line in capfd.readouterr().out.splitlines()]
    rows = [json.loads(line) for line in said if line.startswith("[[")]
    assert len(rows) == processes and all(row == rows[0] for row in rows)
    expected = pipes.alone(kind, 1)
    print(f"largest difference: {np.abs(np.array(rows[0]) - expected).max():.1e}")
    np.testing.assert_allclose(rows[0], expected, rtol=0, atol=1e-5)


def test_stages_share_a_batch_and_divide_the_layers(pipes) -> None:
    """Rows outside the layers are split over the stages too; a stage holds its layers and no others."""
    config = pipes.run_config("gpt", {"data": 2, "pipe": 4}, {})
    program = pipes.program_of(config)
    up = program.abstract_state["params"]["layers"]["feed_forward"]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (2, 16, 32)
    tokens = program.abstract_batch(config.stages[0])["tokens"]
    assert tokens.sharding.shard_shape(tokens.shape) == (2, 16)
    assert program.model.pipeline == (4, 1, 16, 2, False)


def test_a_dry_run_says_how_idle_stages_are(pipes) -> None:
    config = pipes.run_config("gpt", {"data": 2, "pipe": 4}, CIRCULAR | {"microbatches": 4}, 2)
    said = [line for line in describe(config).splitlines() if line.startswith("pipeline")]
    assert said == [
        "pipeline     pretrain: 4 stages, 2 groups of layers each, 4 microbatches; a stage is idle 27% of its time"
    ]


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `libtpu`)")
@pytest.mark.parametrize("pipeline", [{}, CIRCULAR], ids=["gpipe", "circular"])
def test_compiled_for_tpus(pipes, pipeline: dict) -> None:
    """For sixteen v5e chips: what every turn sends along the stages goes to neighbours."""
    config = pipes.run_config("gpt", {"fsdp": 2, "pipe": 4, "tensor": 2}, pipeline)
    program = make_program(config, make_mesh(config.execution.mesh, describe_topology("v5e:4x4")))
    text = lower_train_step(program, config.stages[0]).compile().as_text()
    along = [c for c in collectives(text, program.mesh.shape) if "pipe" in c.axes]
    turns = program.model.pipeline.iterations(program.model.pipeline.microbatches(pipes.ROWS))
    assert {c.kind for c in along if c.count >= turns and c.kind != "all-to-all"} == {"collective-permute"}, along


@pytest.mark.parametrize(
    ("mesh", "pipeline", "changes", "message"),
    [
        ({"pipe": 4}, {}, {"layers": 6}, r"layers 6 is not divisible by mesh.pipe = 4; mesh.pipe may be one of 1, 2"),
        (
            {"pipe": 4}, CIRCULAR, {"layers": 12},
            r"layers 12 .* mesh.pipe \* execution.pipeline.repeats = 4 \* 2 = 8; mesh.pipe may be one of 1, 2, 3, 6",
        ),
        ({"pipe": 2}, CIRCULAR | {"repeats": 5}, {}, r"= 2 \* 5 = 10; with repeats = 5 no mesh.pipe does"),
        ({"pipe": 4}, {"microbatches": 2}, {}, r"pipeline.microbatches 2 are fewer than the 4 stages .* use 4 or"),
        ({"pipe": 4}, {"microbatches": 6}, {}, r"microbatches 6 is not a multiple of mesh.pipe = 4; use 4 or 8"),
        ({"data": 4, "pipe": 2}, {"microbatches": 8}, {}, r"16 rows .* data\*fsdp\*exec.*microbatches = 32"),
        ({"data": 4, "pipe": 2}, {"microbatches": 8}, {}, r"microbatches may be one of \[2, 4\]"),
        ({"data": 2, "pipe": 4}, {}, {"microbatches": 4}, r"by pipe\*data\*fsdp\*microbatches = 32; use 32"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_named_before_anything_is_traced(pipes, mesh, pipeline, changes, message) -> None:
    config = pipes.run_config("gpt", mesh, pipeline, **changes)
    with pytest.raises(ConfigError, match=message) as refusal:
        check_batches(config, make_mesh(config.execution.mesh, jax.devices()[: int(np.prod([*mesh.values()]))]))
    assert "\n" not in str(refusal.value) and refusal.value.exit_code == 78


def test_a_row_of_the_table_lays_parameters_out_anew(pipes) -> None:
    """Here the feed-forward's inner width over both axes, the model's width over none."""
    config = pipes.run_config("gpt", {"fsdp": 2, "tensor": 2, "axes": [["embed", []], ["mlp", ["fsdp", "tensor"]]]}, {})
    state = pipes.program_of(config).abstract_state
    up = state["params"]["layers"]["feed_forward"]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (8, 16, 8)


def test_replicas_of_shards_hold_the_same(pipes) -> None:
    """HSDP: parameters are split over fsdp and repeat over data."""
    up = pipes.program_of(pipes.run_config("gpt", {"data": 2, "fsdp": 4}, {})).abstract_state["params"]["layers"][
        "feed_forward"
    ]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (8, 4, 32)
    holders = up.sharding.devices_indices_map(up.shape)
    assert len({str(index) for index in holders.values()}) == 4 and len(holders) == 8
