"""Whether a step fits into its devices' memory, and which settings would make it fit: read off compiled programs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import psutil

from bertgpt_jax.config import build
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.parallel.mesh import fully_sharded, make_mesh
from bertgpt_jax.parallel.sharding import batch_shards, bytes_per_device
from bertgpt_jax.training import setup
from bertgpt_jax.training.paths import head_chunks, scored_positions
from bertgpt_jax.training.run_config import RunConfig, StageConfig, with_changes

SETTINGS_SHOWN = 3
_UNITS = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_USED_OF = re.compile(r"Used ([\d.]+)([BKMGT]?) of ([\d.]+)([BKMGT]?)")
"""How XLA for TPUs says that a program does not fit (`Used 18.05G of 15.75G hbm`)."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class OutOfMemory(ConfigError):
    """A step needs more memory than its devices have (78): the same settings will not fit another time either."""


# ---------------------------------------------------------------- what there is and what is needed


def available_bytes(device: jax.Device) -> int | None:
    """Memory that programs may use on a device: its own; on the CPU its share of the machine's. None if unknown."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    whole = psutil.virtual_memory().total
    if _CGROUP_LIMIT.is_file() and (text := _CGROUP_LIMIT.read_text().strip()).isdigit():
        whole = min(whole, int(text))
    return whole // jax.local_device_count()


def step_bytes(compiled: Any) -> int | None:
    """Memory of one device that a compiled step takes at its peak: state, batch, gradients, activations, code."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    given_back = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return given_back + found.temp_size_in_bytes + found.generated_code_size_in_bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a device's or the host's refusal of memory."""
    said = ("RESOURCE_EXHAUSTED", "Out of memory allocating")  # the latter by XLA for CPUs, as an INTERNAL error
    told = isinstance(error, jax.errors.JaxRuntimeError) and any(words in str(error) for words in said)
    return told or isinstance(error, MemoryError)


# ---------------------------------------------------------------- checks


def check(program: setup.Program, shape: StageConfig, compiled: Any) -> None:
    """Raises OutOfMemory if a compiled step needs more than a device has at all."""
    have, need = available_bytes(program.mesh.devices.flat[0]), step_bytes(compiled)
    if have is not None and need is not None and need > have:
        raise OutOfMemory(_message(program, shape, need, have))


def explained(error: Exception, program: setup.Program | None, shape: StageConfig | None) -> Exception:
    """`OutOfMemory` in place of a refusal of memory met with this program and shape; any other error as it is."""
    if isinstance(error, OutOfMemory) or not is_out_of_memory(error) or program is None or shape is None:
        return error
    told, have = _told(error), available_bytes(program.mesh.devices.flat[0])
    if told is None:
        told = _compiled_bytes(program, shape), have
    found = OutOfMemory(_message(program, shape, *told))
    found.__cause__ = error
    return found


def _told(error: BaseException) -> tuple[int, int] | None:
    """(bytes needed, bytes available) where the compiler's message has both."""
    match = _USED_OF.search(str(error))
    if match is None:
        return None
    used, used_unit, limit, limit_unit = match.groups()
    return tuple(
        int(float(number) * 2 ** _UNITS[unit or "B"]) for number, unit in ((used, used_unit), (limit, limit_unit))
    )


def _compiled_bytes(program: setup.Program, shape: StageConfig) -> int | None:
    """What a step would need: read off its compiled program, or off the compiler's refusal. None if neither says."""
    try:
        return step_bytes(setup.lower_train_step(program, shape).compile())
    except jax.errors.JaxRuntimeError as error:
        told = _told(error)
        return told[0] if told else None


# ---------------------------------------------------------------- what would help


def _message(program: setup.Program, shape: StageConfig, need: int | None, have: int | None) -> str:
    state = setup.stage_state(program, shape)
    held = bytes_per_device(state, jax.tree.map(lambda x: x.sharding, state))
    kind = program.mesh.devices.flat[0].device_kind
    helping = _helping(program, shape, need, have)
    others = [
        f"{setting}: {_shown(size)}" + ("" if _fits(size, have) else ", still too much") for setting, size in helping
    ]
    return (
        f"stage '{shape.name}' does not fit: a step of {shape.batch_size} x {shape.sequence_length} needs "
        f"{_shown(need)} a device, available are {_shown(have)} ({kind}); parameters and optimizer alone are "
        f"{_shown(held)}. With other settings it would need: {'; '.join(others) or 'no less'}"
    )


def _helping(program: setup.Program, shape: StageConfig, need: int | None, have: int | None) -> list[tuple[str, int]]:
    """Up to three settings with the bytes a step then needs: the first that fit, then those that need the least."""
    fitting: list[tuple[str, int]] = []
    less: list[tuple[str, int]] = []
    for setting, other, other_shape in _others(program, shape):
        size = _compiled_bytes(other, other_shape)
        if size is not None and (need is None or size < need):
            (fitting if _fits(size, have) else less).append((setting, size))
        if len(fitting) == SETTINGS_SHOWN:
            break
    return [*fitting, *sorted(less, key=lambda found: found[1])][:SETTINGS_SHOWN]


def _fits(size: int, have: int | None) -> bool:
    return have is None or size <= have


def _shown(size: int | None) -> str:
    return "an unknown number of bytes" if size is None else f"{size:,} bytes ({size / 2**30:.2f} GiB)"


def _others(program: setup.Program, shape: StageConfig) -> Iterator[tuple[str, setup.Program, StageConfig]]:
    """Settings that may help, one at a time, as (setting, program, shape); a smaller batch, another recipe, last."""
    config, rows = program.config, shape.batch_size // batch_shards(program.mesh)
    parts = [k for k in range(shape.microbatches + 1, rows + 1) if rows % k == 0]
    if parts:
        yield _with_stage(program, shape, "microbatches", _middle(parts))
    compute = config.execution.compute
    if compute.remat != "full":
        yield "execution.compute.remat=full", _with_execution(program, "compute", {"remat": "full"}), shape
    scored = scored_positions(config, shape.sequence_length)
    chunks = [n for n in head_chunks(config, program.mesh) if n < (compute.head_chunk or scored)]
    if chunks:
        chunk = _middle(chunks)
        other = _with_execution(program, "compute", {"head_chunk": chunk})
        yield f"execution.compute.head_chunk={chunk}", other, shape
    mesh = fully_sharded(program.mesh)
    if mesh is not None:
        setting = " ".join(f"execution.mesh.{axis}" for axis in ("data=1", *mesh.describe().split(",")))
        yield setting, _with_execution(program, "mesh", mesh.model_dump(mode="json")), shape
    if compute.dtype != "bfloat16":
        other = _with_execution(program, "compute", {"dtype": "bfloat16"})
        yield "execution.compute.dtype=bfloat16", other, shape
    if rows > 1 and rows % 2 == 0 and shape.microbatches == 1:
        yield _with_stage(program, shape, "batch_size", shape.batch_size // 2)


def _middle(sizes: list[int]) -> int:
    """The one nearest to the geometric mean of the least and the largest."""
    middle = math.sqrt(sizes[0] * sizes[-1])
    return min(sizes, key=lambda size: abs(math.log(size / middle)))


def _with_stage(program: setup.Program, shape: StageConfig, name: str, value: int) -> tuple:
    tree = shape.model_dump(mode="json") | {name: value}
    return f"stages.{shape.name}.{name}={value}", program, build(StageConfig, tree, "stage")


def _with_execution(program: setup.Program, part: str, changes: dict[str, Any]) -> setup.Program:
    """The program with other settings of `execution.compute` or `execution.mesh`."""
    execution = program.config.execution.model_dump(mode="json")
    execution[part] |= changes
    config: RunConfig = with_changes(program.config, {"execution": execution})
    return setup.make_program(config, make_mesh(config.execution.mesh, list(program.mesh.devices.flat)))
