"""Mesh sizes: -1, products, what is not there yet, and the words of refusal."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertgpt_jax.config import build
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.parallel.axes import LOGICAL_AXES, TOGETHER
from bertgpt_jax.parallel.mesh import AXES, MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("fields", "devices", "expected"),
    [
        ({}, 8, (8, 1, 1, 1, 1)),
        ({}, 1, (1, 1, 1, 1, 1)),
        (dict(fsdp=-1, data=1), 8, (1, 8, 1, 1, 1)),
        (dict(data=2, fsdp=-1, tensor=2), 8, (2, 2, 1, 1, 2)),
        (dict(tensor=2), 8, (4, 1, 1, 1, 2)),
        (dict(data=8, pipe=-1), 8, (8, 1, 1, 1, 1)),
        (dict(data=4, pipe=-1), 8, (4, 1, 2, 1, 1)),
    ],
)
def test_sizes(fields: dict, devices: int, expected: tuple) -> None:
    assert tuple(MeshConfig(**fields).resolve(devices).values()) == expected


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.sampled_from(["data", "fsdp", "tensor", None]))
def test_minus_one_is_what_is_left(data: int, fsdp: int, tensor: int, free: str | None) -> None:
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
    asked = sizes | ({free: -1} if free else {})
    assert MeshConfig(**asked).resolve(math.prod(sizes.values())) == sizes | {"pipe": 1, "context": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(data=3), r"mesh data=3 does not multiply to 8 devices; .* \(1,1,8\), .*\(2,2,2\)"),
        (dict(data=-1, fsdp=3), r"mesh data=-1,fsdp=3 does not multiply to 8 devices"),
        (dict(data=1), "does not multiply to 8 devices"),
        (dict(data=-1, tensor=-1), "one of them may be -1"),
        (dict(data=0), "sizes are positive"),
        (dict(data=4, pipe=3), r"mesh data=4,pipe=3 does not multiply to 8 devices; pipe=3 does not divide them"),
        (dict(data=3, pipe=2, context=2), r"with pipe=2, context=2, \(data, fsdp, tensor\) may be one of \(1,1,2\)"),
    ],
)
def test_refusals_name_sizes_and_what_fits(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        MeshConfig(**fields).resolve(8)
    assert "\n" not in str(refusal.value) and refusal.value.exit_code == 78


def test_every_shape_offered_fits() -> None:
    with pytest.raises(ConfigError) as refusal:
        MeshConfig(data=5).resolve(12)
    offered = [tuple(map(int, shape)) for shape in re.findall(r"\((\d+),(\d+),(\d+)\)", str(refusal.value))]
    assert len(offered) == 12 and all(math.prod(shape) == 12 for shape in offered)
    for data, fsdp, tensor in offered:
        MeshConfig(data=data, fsdp=fsdp, tensor=tensor).resolve(12)


def test_mesh_has_all_axes_in_order_and_is_automatic() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == AXES and mesh.devices.shape == (2, 2, 1, 1, 2)
    assert list(mesh.devices.flat) == jax.devices()
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_fewer_devices_may_be_given() -> None:
    assert make_mesh(MeshConfig(), jax.devices()[:2]).devices.size == 2


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What jax's device ordering reads of a device."""

    id: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H200"
    process_index: int = 0
    slice_index: int = 0


def test_accelerators_are_ordered_by_their_links() -> None:
    """Any platform but the CPU goes through jax's own device order."""
    mesh = make_mesh(MeshConfig(data=4, tensor=2), [FakeDevice(i) for i in range(8)])
    assert mesh.devices.shape == (4, 1, 1, 1, 2)


def on_slices(slices: int, platform: str = "tpu", **fields):
    """The slice of each device of a mesh over eight of them."""
    devices = [FakeDevice(i, platform, "NVIDIA H200", 0, i % slices) for i in range(8)]
    return np.vectorize(lambda device: device.slice_index)(make_mesh(MeshConfig(**fields), devices).devices)


def test_replicas_span_slices() -> None:
    slices = on_slices(2, "gpu", data=2, fsdp=2, tensor=2)
    assert np.all(slices[0] == slices[0].flat[0]) and np.all(slices[1] == 1 - slices[0])


def test_shards_span_slices_if_asked() -> None:
    slices = on_slices(2, "gpu", data=2, fsdp=2, tensor=2, dcn_fsdp=2)
    assert np.all(slices[:, 0] == slices.flat[0]) and np.all(slices[:, 1] == 1 - slices.flat[0])
    both = on_slices(4, "gpu", data=2, fsdp=4, dcn_data=2, dcn_fsdp=2)
    assert len({both[i, j, 0, 0, 0] for i in (0, 1) for j in (0, 2)}) == 4
    assert np.all(both[:, 0] == both[:, 1]) and np.all(both[:, 2] == both[:, 3])


def test_gpus_of_several_hosts_need_no_replicas() -> None:
    assert sorted(on_slices(2, "gpu", data=1, fsdp=8).flat) == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("slices", "fields", "message"),
    [
        (1, dict(data=8, dcn_data=2), r"mesh.dcn_data \* mesh.dcn_fsdp = 2 \* 1 slices, and the devices are 1; leave"),
        (1, dict(data=8, dcn_fsdp=2), r"1 \* 2 slices, and the devices are 1; leave dcn_data null and dcn_fsdp 1"),
        (2, dict(data=8, dcn_data=4), r"4 \* 1 slices, and the devices are 2; their product must be 2"),
        (2, dict(data=1, fsdp=8), r"mesh.data = 1 cannot be .* 2 slices; use mesh.data=2 .* mesh.dcn_fsdp=2"),
        (2, dict(data=8, dcn_fsdp=2), r"mesh.fsdp = 1 cannot be shared out among 2 slices; use mesh.fsdp=2"),
    ],
)
def test_slices_that_do_not_fit(slices: int, fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        on_slices(slices, **fields)
    assert "\n" not in str(refusal.value)


def test_a_row_of_the_table_may_be_another() -> None:
    assert MeshConfig().logical_axes() == LOGICAL_AXES
    table = dict(MeshConfig(axes=(("embed", ()), ("mlp", ("fsdp", "tensor")))).logical_axes())
    assert table == dict(LOGICAL_AXES) | {"embed": None, "mlp": ("fsdp", "tensor")}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["embd", ["fsdp"]]], "'embd' is no logical axis; did you mean 'embed'"),
        ([["embed", ["fdsp"]]], "rule 'embed': 'fdsp' is no mesh axis; known: data, fsdp, pipe"),
        ([["embed", ["fsdp", "fsdp"]]], "rule 'embed' names a mesh axis twice: fsdp, fsdp"),
        ([["embed", ["fsdp"]], ["embed", []]], "rule 'embed' is given twice"),
        ([["mlp", ["fsdp"]]], "rules 'embed' and 'mlp' both lie along 'fsdp', and an array has both"),
        ([["act_embed", ["fsdp"]]], "rules 'rows' and 'act_embed' both lie along 'fsdp'"),
    ],
)
def test_rows_that_cannot_be(rows: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(MeshConfig, {"axes": rows}, "mesh")


def test_arrays_have_axes_together_that_the_table_knows() -> None:
    assert {name for array in TOGETHER for name in array} == {name for name, _ in LOGICAL_AXES}


@pytest.mark.usefixtures("with_the_cache")
@pytest.mark.parametrize(("context", "kept"), [(1, True), (2, False)])
def test_cpus_that_share_sequences_read_no_compiled_programs(context: int, kept: bool) -> None:
    make_mesh(MeshConfig(context=context))
    assert jax.config.jax_enable_compilation_cache is kept
