"""The device mesh: five axes, always all present, size 1 when unused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from pydantic import Field

from bertgpt_jax.config import Config
from bertgpt_jax.errors import ConfigError

AXES = ("data", "fsdp", "pipe", "context", "tensor")
"""Mesh axes, outermost (slowest links) first: replicas, sharded parameters, pipeline, sequence, heads and width."""


class MeshConfig(Config):
    """Sizes of the mesh axes; at most one may be -1, "whatever is left"."""

    data: int = Field(default=-1, ge=-1)
    fsdp: int = Field(default=1, ge=-1)
    pipe: int = Field(default=1, ge=-1)
    context: int = Field(default=1, ge=-1)
    tensor: int = Field(default=1, ge=-1)

    def resolve(self, devices: int) -> dict[str, int]:
        """Axis name -> size, product equal to `devices`.

        Raises:
            ConfigError: two -1, a 0, or a product that is not the device count (with the shapes that would fit).
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if 0 in sizes.values() or list(sizes.values()).count(-1) > 1:
            raise ConfigError(f"mesh {self.describe()}: sizes are positive, and one of them may be -1")
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if -1 in sizes.values() and devices % fixed == 0:
            sizes[next(axis for axis, size in sizes.items() if size == -1)] = devices // fixed
        if math.prod(sizes.values()) != devices or -1 in sizes.values():
            raise ConfigError(
                f"mesh {self.describe()} does not multiply to {devices} devices; "
                f"(data, fsdp, tensor) may be one of {_factorizations(devices)}"
            )
        return sizes

    def describe(self) -> str:
        """`data=2,fsdp=4`: the axes that are not 1."""
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) != 1) or "data=1"


def _factorizations(devices: int, limit: int = 12) -> str:
    shapes = [
        (data, fsdp, devices // data // fsdp)
        for data in range(1, devices + 1)
        if devices % data == 0
        for fsdp in range(1, devices // data + 1)
        if devices // data % fsdp == 0
    ]
    shown = ", ".join(f"({a},{b},{c})" for a, b, c in shapes[:limit])
    return shown + (", ..." if len(shapes) > limit else "")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, in the order that suits their links, with automatic (GSPMD) axes."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.resolve(len(devices))
    shape = tuple(sizes[axis] for axis in AXES)
    return Mesh(_arranged(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fully_sharded(mesh: Mesh) -> MeshConfig | None:
    """The mesh with every replica made a shard of the parameters; None where there are no replicas."""
    if mesh.shape["data"] == 1:
        return None
    return MeshConfig(**{**mesh.shape, "data": 1, "fsdp": mesh.shape["data"] * mesh.shape["fsdp"]})


def _arranged(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """The devices in the shape of the mesh, neighbours on it near one another; slices lie along `data`.

    Raises:
        ConfigError: several slices among which the replicas cannot be shared out.
    """
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if devices[0].platform == "cpu":
        return np.array(devices).reshape(shape)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise ConfigError(
            f"mesh.data = {shape[0]} cannot be shared out among {slices} slices; only replicas span slices: "
            f"use mesh.data={slices} or a multiple"
        )
    inside, between = (shape[0] // slices, *shape[1:]), (slices,) + (1,) * (len(shape) - 1)
    return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)
