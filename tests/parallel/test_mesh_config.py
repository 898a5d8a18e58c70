"""Mesh sizes: -1, products, what is not there yet, and the words of refusal."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertgpt_jax.errors import ConfigError
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
        (dict(data=4, pipe=3), r"mesh data=4,pipe=3 does not multiply to 8 devices"),
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
