"""The device mesh: five axes, always all present, size 1 when unused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh
from pydantic import Field, field_validator

from bertgpt_jax.config import Config
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.parallel.axes import AXES, Table, replaced, table_problem


class MeshConfig(Config):
    """Sizes of the mesh axes; at most one may be -1, "whatever is left".

    Where devices are several slices, joined by a slower network (DCN), replicas lie across them, so that only gradients
    cross it. `dcn_fsdp` lets shards of the parameters do so too, which are then gathered over it for every layer.
    """

    data: int = Field(default=-1, ge=-1)
    fsdp: int = Field(default=1, ge=-1)
    pipe: int = Field(default=1, ge=-1)
    context: int = Field(default=1, ge=-1)
    tensor: int = Field(default=1, ge=-1)
    dcn_data: int | None = Field(
        default=None, ge=1, description="slices that `data` spans; null: all that `dcn_fsdp` does not"
    )
    dcn_fsdp: int = Field(default=1, ge=1, description="slices that `fsdp` spans")
    axes: tuple[tuple[str, tuple[str, ...]], ...] = Field(
        default=(), description="rows of the table of logical axes (parallel/axes.py) that are to be others"
    )

    @field_validator("axes")
    @classmethod
    def _rows_exist(cls, rows: tuple) -> tuple:
        problem = table_problem(rows)
        if problem:
            raise ValueError(problem)
        return rows

    def logical_axes(self) -> Table:
        """The table of logical axes in force."""
        return replaced(self.axes)

    def across_slices(self, slices: int, sizes: dict[str, int]) -> dict[str, int]:
        """How many slices each mesh axis spans.

        Args:
            sizes: of the whole mesh (`resolve`).

        Raises:
            ConfigError: slices are asked for that are not there, or do not divide the axis that is to span them.
        """
        fsdp = self.dcn_fsdp
        data = max(slices // fsdp, 1) if self.dcn_data is None else self.dcn_data
        if data * fsdp != slices:
            asked = f"mesh.dcn_data * mesh.dcn_fsdp = {data} * {fsdp}"
            fix = "leave dcn_data null and dcn_fsdp 1" if slices == 1 else f"their product must be {slices}"
            raise ConfigError(f"{asked} slices, and the devices are {slices}; {fix}")
        for axis, count in (("data", data), ("fsdp", fsdp)):
            if sizes[axis] % count:
                advice = f"use mesh.{axis}={-(-sizes[axis] // count) * count}"
                other = f", or let shards span slices: mesh.dcn_fsdp={slices}" if axis == "data" and fsdp == 1 else ""
                raise ConfigError(
                    f"mesh.{axis} = {sizes[axis]} cannot be shared out among {count} slices; "
                    f"{advice} or a multiple{other}"
                )
        return {axis: {"data": data, "fsdp": fsdp}.get(axis, 1) for axis in AXES}

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
                f"mesh {self.describe()} does not multiply to {devices} devices; {self._what_fits(devices)}"
            )
        return sizes

    def describe(self) -> str:
        """`data=2,fsdp=4`: the axes that are not 1."""
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) != 1) or "data=1"

    def _what_fits(self, devices: int) -> str:
        others = {axis: getattr(self, axis) for axis in ("pipe", "context") if getattr(self, axis) > 1}
        fixed = math.prod(others.values())
        given = ", ".join(f"{axis}={size}" for axis, size in others.items())
        if devices % fixed:
            able = [n for n in range(1, devices + 1) if devices % n == 0]
            return f"{given} does not divide them; " + f"{' * '.join(others)} may be one of {able}"
        first = f"with {given}, " if given else ""
        return f"{first}(data, fsdp, tensor) may be one of {_factorizations(devices // fixed)}"


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
    """A mesh over all devices, in the order that suits their links, with automatic (GSPMD) axes.

    Where CPU devices share sequences, this process reads no compiled program from a cache any more.

    Raises:
        ConfigError: sizes that are not these devices' (`MeshConfig.resolve`, `MeshConfig.across_slices`).
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.resolve(len(devices))
    if sizes["context"] > 1 and devices[0].platform == "cpu":
        _compile_afresh()
    return Mesh(_arranged(config, devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _compile_afresh() -> None:
    """Turns jax's compilation cache off.

    XLA for CPUs runs the permutes (`jax.lax.ppermute`) of a program that it has read from the cache all at once, and
    mixes up what they send: wrong results, or an abort in its rendezvous (jaxlib 0.10.2).
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax looks at the setting once


def fully_sharded(mesh: Mesh) -> MeshConfig | None:
    """The mesh with every replica made a shard of the parameters; None where there are no replicas."""
    if mesh.shape["data"] == 1:
        return None
    return MeshConfig(**{**mesh.shape, "data": 1, "fsdp": mesh.shape["data"] * mesh.shape["fsdp"]})


def _arranged(config: MeshConfig, devices: list[jax.Device], sizes: dict[str, int]) -> np.ndarray:
    """The devices in the shape of the mesh, neighbours on it near one another, slices along `data` and `fsdp`.

    Raises:
        ConfigError: several slices among which the mesh cannot be shared out.
    """
    shape, platform = tuple(sizes.values()), devices[0].platform
    slices = 1 if platform == "cpu" else len({getattr(device, "slice_index", None) or 0 for device in devices})
    asked = config.dcn_data is not None or config.dcn_fsdp > 1
    if platform != "tpu" and not asked and sizes["data"] % slices:
        slices = 1  # GPUs of several hosts: shards may span hosts too, over a network that is not that slow
    between = tuple(config.across_slices(slices, sizes).values())
    if platform == "cpu":
        return np.array(devices).reshape(shape)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    inside = tuple(size // count for size, count in zip(shape, between, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)
