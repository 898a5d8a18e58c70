"""How fast the collectives along a mesh axis are: which links of the torus, or which network, an axis lies on."""

from __future__ import annotations

import math

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
    sizes = list(shards)
    sizes[0] //= place.slices // dcn_fsdp
    sizes[1] //= dcn_fsdp
    if not place.chip.torus:
        return dict(zip(AXES, _switched(place, sizes), strict=True))
    found: dict[str, float] = {}
    free = list(place.sides)
    for axis, size in reversed(list(zip(AXES, sizes, strict=True))):
        taken = _sides_for(free, size)
        links = sum(2 if whole and place.chip.ring and side % place.chip.ring == 0 else 1 for side, whole in taken)
        found[axis] = place.chip.link_bandwidth * links if taken else math.inf
    return found


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


def _switched(place: Place, sizes: list[int]) -> list[float]:
    """GPUs: an axis that fits into a host with all axes inside it runs over its switch, others over the network."""
    inside, found = 1, []
    for size in reversed(sizes):
        inside *= size
        within = inside <= place.chip.chips_per_host
        found.append(math.inf if size == 1 else place.chip.link_bandwidth if within else place.chip.dcn_bandwidth)
    return found[::-1]
