"""How fast the collectives along a mesh axis are: which links of the torus, or which network, an axis lies on."""

from __future__ import annotations

import itertools
import math
import operator

from bertgpt_jax.parallel.mesh import AXES
from bertgpt_jax.planning.places import Place
from bertgpt_jax.planning.work import Shards


def axis_bandwidth(place: Place, shards: Shards, dcn_fsdp: int = 1) -> dict[str, float]:
    """Bytes a second that a chip sends along each axis inside a slice; infinite where there is nothing to send.

    Axes take sides of the torus from the innermost on, as `mesh_utils` lays them: whole sides where they match, parts
    of sides else. A whole side that is closed to a ring is used both ways.

    Args:
        dcn_fsdp: slices that the second axis spans; the first spans the others.
    """
    sizes = _in_slice(place, shards, dcn_fsdp)
    if not place.chip.torus:
        far, chip = over_network(place, shards, dcn_fsdp), place.chip
        speed = {a: chip.dcn_bandwidth if a in far else chip.link_bandwidth for a in AXES}
        return {a: speed[a] if n > 1 else math.inf for a, n in zip(AXES, sizes, strict=True)}
    found: dict[str, float] = {}
    free = list(place.sides)
    for axis, size in reversed(list(zip(AXES, sizes, strict=True))):
        taken = _sides_for(free, size)
        links = sum(2 if whole and place.chip.ring and side % place.chip.ring == 0 else 1 for side, whole in taken)
        found[axis] = place.chip.link_bandwidth * links if taken else math.inf
    return found


def over_network(place: Place, shards: Shards, dcn_fsdp: int = 1) -> tuple[str, ...]:
    """Axes whose collectives leave the host inside a slice; none where a torus joins all hosts."""
    if place.chip.torus:
        return ()
    sizes = _in_slice(place, shards, dcn_fsdp)
    reach = dict(zip(reversed(AXES), itertools.accumulate(reversed(sizes), operator.mul), strict=True))
    return tuple(a for a, n in zip(AXES, sizes, strict=True) if n > 1 and reach[a] > place.chip.chips_per_host)


def _in_slice(place: Place, shards: Shards, dcn_fsdp: int) -> Shards:
    return shards._replace(data=shards.data // (place.slices // dcn_fsdp), fsdp=shards.fsdp // dcn_fsdp)


def _sides_for(free: list[int], size: int) -> list[tuple[int, bool]]:
    """Takes `size` chips out of the free sides (in place): (chips along a side, whether it is a whole side)."""
    if size == 1:
        return []
    best: list[int] = []
    for subset in range(1, 2 ** len(free)):
        chosen = [i for i in range(len(free)) if subset >> i & 1 and free[i] > 1]
        if math.prod(free[i] for i in chosen) == size and len(chosen) > len(best):
            best = chosen
    if best:
        taken = [(free[i], True) for i in best]
        for i in best:
            free[i] = 1
        return taken
    taken, left = [], size
    for i in sorted(range(len(free)), key=lambda i: -free[i]):
        part = math.gcd(free[i], left)
        if part > 1:
            taken.append((part, part == free[i]))
            free[i] //= part
            left //= part
    return taken
