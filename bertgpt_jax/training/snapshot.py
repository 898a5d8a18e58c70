"""The state as a save sees it: arrays that training does not touch, and their fingerprints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bertgpt_jax.training.fingerprint import fingerprint_vector


class Snapshots:
    """Takes snapshots of states of one layout; the memory of each is taken over by the next.

    On the CPU a save would hold the live buffers until they are written, and the next donated step would wait for it:
    there a snapshot is a copy. Its memory is kept, because fresh pages cost more time than the copy itself. Elsewhere
    Orbax copies to the host before its `save` returns, and a copy would double the memory: a snapshot is the state.
    """

    def __init__(self) -> None:
        self._copies = jax.default_backend() == "cpu"
        self._layout: list[Any] | None = None
        self._compiled: Callable[..., Any]
        self._last: dict[str, jax.Array] | None = None

    def take(self, flat: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, int]]:
        """Arrays and fingerprints of a state, in one pass over it; the arrays of the snapshot before are gone."""
        layout = [(path, x.shape, x.dtype, x.sharding) for path, x in flat.items()]
        if self._layout != layout:
            self._layout, self._last = layout, None
            self._compiled = self._compile(flat)
        if self._copies and self._last is None:
            self._last = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), flat)
        self._last, values = self._compiled(flat, self._last)
        numbers = np.asarray(jax.device_get(values))
        fingerprints = {path: int(n) for path, n in zip(sorted(flat), numbers, strict=True)}
        return (flat if self._last is None else self._last), fingerprints

    def forget(self) -> None:
        """Leaves the last snapshot's memory to whoever still reads it."""
        self._last = None

    def _compile(self, flat: dict[str, jax.Array]) -> Callable[..., Any]:
        shardings = {path: x.sharding for path, x in flat.items()} if self._copies else None
        in_slabs = self._copies and all(len(x.sharding.device_set) == 1 for x in flat.values())

        def snapshot(tree: dict[str, jax.Array], _: Any) -> tuple[Any, Any]:
            prints = fingerprint_vector(tree, in_slabs=in_slabs)
            return (jax.tree.map(jnp.copy, tree) if self._copies else None), prints

        return jax.jit(snapshot, out_shardings=(shardings, None), donate_argnums=1, keep_unused=True)
