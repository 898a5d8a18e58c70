"""A run is the same on every mesh: losses, gradient norms, constraints in the program, no involuntary copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from bertgpt_jax.parallel.mesh import make_mesh
from bertgpt_jax.training import setup

WARNING = "Involuntary full rematerialization"
ON_MESHES = ["8", "2,2,2", "1,8,1", "4,1,2", "1,1,8"]
CASES = [
    ("gpt", ["2,2,2"]),
    pytest.param("bert", ON_MESHES, marks=pytest.mark.slow),
    pytest.param("gpt", ON_MESHES, marks=pytest.mark.slow),
]


def run_program(repository: Path, kind: str, meshes: list[str]) -> tuple[dict, str, str]:
    """Results of `mesh_runs.py` by mesh, stderr of the runs, stderr of the control; in its own process.

    XLA writes its warnings to stderr and writes none for a program that comes from the cache.
    """
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "PYTHONPATH": str(repository),
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("mesh_runs.py"), kind, "one", *meshes],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    runs, _, control = done.stderr.partition("control\n")
    return json.loads(done.stdout.splitlines()[-1]), runs, control


@pytest.mark.parametrize(("kind", "meshes"), CASES, ids=["gpt", "bert on all", "gpt on all"])
def test_five_steps_equal_one_devices_without_involuntary_copies(repository, kind: str, meshes: list[str]) -> None:
    """Dropout is on: its masks depend on the position in the batch, not on the device."""
    results, stderr, control = run_program(repository, kind, meshes)
    for metric in ("loss", "grad_norm"):
        expected = np.array(results["one"][metric])
        assert len(set(expected)) == 5
        for mesh in meshes:
            difference = np.abs(np.array(results[mesh][metric]) - expected).max()
            print(f"{mesh} {metric}: {difference:.1e}")
            assert difference <= 1e-5, (mesh, metric)
    assert WARNING not in stderr
    if jax.__version_info__ < (0, 11):  # newer compilers split the control's lookup without a word
        assert WARNING in control, "the warning would have been seen"


# What the code constrains: q, k, v, the feed-forward's inner activation and both residual sums of a block; each
# embedding table before its lookup, the stack's input, and the head's input (BERT's gathered positions) and logits.
A_LAYER = 6
OUTSIDE = {"bert": 3 + 1 + 2, "gpt": 2 + 1 + 1}


def constraints(runs, kind: str, context=None, train: bool = False, layers: int = 2, **compute) -> int:
    """Constraints in the lowered program, where the body of the layers stands once, scanned or not."""
    config = runs.run_config(kind, (2, 2, 2), layers, **compute)
    stage = config.stages[0].model_copy(update={"microbatches": 1})
    program = setup.make_program(config, make_mesh(config.execution.mesh))
    lower = setup.lower_train_step if train else setup.lower_eval_step
    with pytest.MonkeyPatch.context() as patch:
        if context is not None:
            patch.setattr(setup.sharding, "mesh_context", context)
        return lower(program, stage).as_text().count("sdy.sharding_constraint")


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_number_of_constraints(runs, kind: str, unroll: bool) -> None:
    bodies = (
        {1, runs.LAYERS} if unroll else {1}
    )  # from jax 0.11 on, an unrolled body stands in the program once a layer
    forward = constraints(runs, kind, unroll_layers=unroll)
    assert forward in {n * A_LAYER + OUTSIDE[kind] for n in bodies}
    assert constraints(runs, kind, train=True, unroll_layers=unroll) == 2 * forward, "each has its transpose"


def test_a_recomputed_layer_is_constrained_again(runs) -> None:
    """A post-norm layer needs its last sum again for the norm's gradient; a pre-norm layer does not."""
    assert constraints(runs, "bert", train=True, remat="full") == 2 * (A_LAYER + OUTSIDE["bert"]) + A_LAYER
    assert constraints(runs, "gpt", train=True, remat="full") == 2 * (A_LAYER + OUTSIDE["gpt"]) + A_LAYER - 1


def test_constraints_of_every_layer_reach_the_jaxpr(runs) -> None:
    """Once a layer: the traced program has one scan over the layers with the layer's constraints inside."""
    config = runs.run_config("gpt", (2, 2, 2), layers=5)
    program = setup.make_program(config, make_mesh(config.execution.mesh))
    inputs = config.objective.model_inputs(config.objective.abstract_batch(8, runs.LENGTH))
    with setup.sharding.mesh_context(program.mesh):
        jaxpr = jax.make_jaxpr(lambda p, *x: program.model.apply({"params": p}, *x))(
            program.abstract_state["params"], *inputs
        )
    assert count(jaxpr.jaxpr) == 5 * A_LAYER + OUTSIDE["gpt"]


def count(jaxpr) -> int:
    """Sharding constraints that one evaluation executes."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = [getattr(parameter, "jaxpr", parameter) for parameter in equation.params.values()]
        total += times * sum(count(body) for body in inner if hasattr(body, "eqns"))
        total += equation.primitive.name == "sharding_constraint"
    return total


def test_constraints_would_be_missed_without_set_mesh(runs) -> None:
    """`with mesh:` alone, or no mesh: Linen drops every constraint in silence, and only speed tells."""

    def rules_alone(mesh, table):
        return nn.logical_axis_rules(table)

    assert constraints(runs, "gpt", context=rules_alone) == 0


@pytest.mark.parametrize("mesh", ON_MESHES)
def test_state_is_split_and_batches_by_rows(runs, mesh: str) -> None:
    """Moments lie where their parameters do; a device holds its share and no more."""
    config = runs.run_config("gpt", runs.MESHES[mesh])
    program = setup.make_program(config, make_mesh(config.execution.mesh))
    _, fsdp, tensor = runs.MESHES[mesh]
    state = setup.sharding.flatten(program.abstract_state)
    params = {name.removeprefix("params/"): leaf for name, leaf in state.items() if name.startswith("params/")}
    up = params["layers/feed_forward/up/kernel"]
    assert up.sharding.shard_shape(up.shape) == (2, 16 // fsdp, 32 // tensor)
    query = params["layers/attention/query/kernel"]
    assert query.sharding.shard_shape(query.shape) == (2, 16 // fsdp, runs.HEADS // tensor, 2)
    moments = [n for n in state if n.startswith("optimizer") and n.endswith("layers/feed_forward/up/kernel")]
    assert len(moments) == 2 and all(state[name].sharding == up.sharding for name in moments)
    tokens = program.abstract_batch(config.stages[0])["tokens"]
    assert tokens.sharding.shard_shape(tokens.shape) == (16 * tensor // 8, 16)
