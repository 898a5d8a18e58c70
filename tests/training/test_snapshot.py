"""What a save reads: a copy that training cannot touch, in the memory of the copy before."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bertgpt_jax.training import page_cache, storage
from bertgpt_jax.training.fingerprint import fingerprint_tree
from bertgpt_jax.training.page_cache import Uncached
from bertgpt_jax.training.snapshot import Snapshots


def _state(seed: int, width: int = 64, spread: bool = False) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("x")) if spread else None
    return {
        "w": jax.device_put(rng.standard_normal((1024, width)).astype(np.float32), sharding),
        "b": jax.device_put(rng.standard_normal(64).astype(jnp.bfloat16), sharding),
        "step": jax.device_put(jnp.int32(seed), NamedSharding(mesh, P()) if spread else None),
    }


@pytest.mark.parametrize("spread", [False, True])
def test_a_snapshot_is_the_state_of_its_moment(spread: bool) -> None:
    donate = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    snapshots = Snapshots()
    for seed in range(3):
        state = _state(seed, spread=spread)
        expected, prints = jax.device_get(state), fingerprint_tree(state)
        arrays, fingerprints = snapshots.take(state)
        donate(state)
        assert fingerprints == prints
        for path, x in arrays.items():
            np.testing.assert_array_equal(np.asarray(x), expected[path])
            assert x.sharding == state[path].sharding


def test_its_memory_is_the_next_ones_unless_it_is_forgotten() -> None:
    def places(arrays: dict[str, jax.Array]) -> set[int]:
        return {x.unsafe_buffer_pointer() for x in arrays.values()}

    snapshots = Snapshots()
    first, _ = snapshots.take(_state(0))
    memory = places(first)
    second, _ = snapshots.take(_state(1))
    assert all(x.is_deleted() for x in first.values()) and places(second) == memory
    snapshots.forget()
    third, _ = snapshots.take(_state(2))
    assert not any(x.is_deleted() for x in second.values()) and not places(third) & memory


def test_a_state_of_another_shape_is_another_snapshot() -> None:
    snapshots = Snapshots()
    snapshots.take(_state(0))
    arrays, _ = snapshots.take(_state(1, width=32))
    assert arrays["w"].shape == (1024, 32)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no advice about caches on this system")
@pytest.mark.parametrize("told", [False, True])
def test_files_are_dropped_until_the_end_is_seen_or_told(told: bool, monkeypatch: Any, tmp_path: Path) -> None:
    dropped: set[str] = set()
    three = threading.Event()

    def advise(descriptor: int, *_: int) -> None:
        dropped.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        if len(dropped) == 3:
            three.set()

    monkeypatch.setattr(storage, "filesystem", lambda path: "ext4")
    monkeypatch.setattr(os, "posix_fadvise", advise)
    directory = tmp_path / "state"
    uncached = Uncached(epath.Path(directory), epath.Path(directory / "end"))
    (directory / "below").mkdir(parents=True)
    files = [directory / "a", directory / "b", directory / "below" / "c"]
    for path in files:
        path.write_bytes(b"x" * 10_000)
    assert three.wait(20)
    if told:
        uncached.stop()
    else:
        (directory / "end").touch()
    uncached._thread.join(20)
    assert not uncached._thread.is_alive()
    assert {str(path) for path in files} <= dropped <= {str(path) for path in [*files, directory / "end"]}
    assert all(path.read_bytes() == b"x" * 10_000 for path in files)


@pytest.mark.parametrize("kind", ["nfs4", "tmpfs", None])
def test_shared_and_unknown_file_systems_are_left_alone(kind: str | None, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "filesystem", lambda path: kind)
    uncached = Uncached(epath.Path(tmp_path), epath.Path(tmp_path / "end"))
    assert uncached._thread is None and kind not in page_cache.DISKS
    uncached.stop()
