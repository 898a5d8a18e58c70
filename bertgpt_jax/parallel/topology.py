"""Devices of TPU pods that are not here, to compile for (`jax.experimental.topologies`; extra `libtpu`)."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import jax

from bertgpt_jax.errors import ConfigError

ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5e-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu reads so that it asks no metadata server and takes no lock; the accelerator need not be the pod's."""


@functools.cache
def describe(name: str, slices: int = 1) -> tuple[jax.Device, ...]:
    """The devices of `slices` slices of a TPU topology; programs compile for them, nothing runs on them.

    Two calls with the same arguments give the same objects.

    Args:
        name: generation and chips a side, as libtpu names them: `v5e:4x4`, `v6e:16x16`, `v5:4x4x4` (v5p).

    Raises:
        ConfigError: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"compiling for {name} needs libtpu; run: pip install 'bertgpt_jax[libtpu]'")
    from jax.experimental import topologies

    for variable, value in ALONE.items():
        os.environ.setdefault(variable, value)
    settings: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4"):  # libtpu would make each of a chip's two cores a device, which no run does
        settings["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **settings)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"topology '{name}': libtpu has none of that name ({text[:200]}); use e.g. v5e:4x4") from None
    return tuple(found.devices)
