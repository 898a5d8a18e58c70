"""Names of places to run: `v5p:8x8x16`, cloud names such as `v5p-512`, `h100:8`, `cpu:8`."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.planning.chips import CHIPS, Chip

_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "trillium": "v6e"}

_SMALL_TORUS = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""v4 and v5p below a cube of 64 chips (cloud.google.com/tpu/docs/v4, v5p); above, every side is a multiple of 4."""

_PLANES = {
    "v5e": ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    "v6e": ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
}
_LARGEST = {"v4": (16, 16, 16), "v5p": (16, 16, 24)}
_MOST_GPUS = 8


@dataclasses.dataclass(frozen=True)
class Place:
    """Chips that a run may have.

    Attributes:
        chip: which.
        sides: of the torus of one slice; (n,) for GPUs and CPU devices.
        slices: how many of them; they are joined by the data-centre network.
    """

    chip: Chip
    sides: tuple[int, ...]
    slices: int = 1

    @property
    def slice_chips(self) -> int:
        """Chips of one slice."""
        return math.prod(self.sides)

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slice_chips * self.slices

    @property
    def hosts(self) -> int:
        """Machines of all slices: a single one up to 8 chips of a plane, else one for every 4 TPUs or 8 GPUs."""
        alone = self.chip.torus == 2 and self.slice_chips <= 8
        return self.slices * (1 if alone else -(-self.slice_chips // self.chip.chips_per_host))

    @property
    def name(self) -> str:
        """`v5p:8x8x16`, of one slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

    @property
    def cloud_name(self) -> str:
        """`v5p-2048`: v4 and v5p count cores, of which a chip has two."""
        label = "v5litepod" if self.chip.name == "v5e" else self.chip.name
        return f"{label}-{self.slice_chips * self.chip.cores}" if self.chip.platform == "tpu" else self.name

    def describe(self) -> str:
        """`1,024 chips v5p, torus 8x8x16 (v5p-2048), 256 hosts`."""
        switched = "one switch" if self.hosts == self.slices else "a switch in each host"
        shape = f"torus {'x'.join(map(str, self.sides))} ({self.cloud_name})" if self.chip.torus else switched
        several = f", {self.slices} slices of {self.slice_chips:,}" if self.slices > 1 else ""
        return f"{self.chips:,} chips {self.chip.name}{several}, {shape}, {self.hosts:,} hosts"


def parse(text: str, slices: int = 1) -> Place:
    """A place from `CHIP:SIDES` (`v5e:4x4`, `h100:8`, `cpu:8`) or a cloud's name (`v5litepod-256`, `v4-32`).

    Raises:
        ConfigError: no such chip, or none of that size; the nearest is named.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?::([0-9x]+)|-([0-9]+))", text.strip().lower())
    if match is None or slices < 1:
        raise ConfigError(
            f"topology '{text}' x {slices}: give CHIP:SIDES or a cloud's name: v5p:8x8x16, v5litepod-256, h100:8, cpu:8"
        )
    name, sides, count = match.groups()
    chip = CHIPS.get(_ALIASES.get(name, name))
    if chip is None:
        close = difflib.get_close_matches(name, [*CHIPS, *_ALIASES], 1, 0.3)
        advice = f"did you mean '{close[0]}'? " if close else ""
        raise ConfigError(f"topology '{text}': no chip '{name}'; {advice}known: {', '.join(CHIPS)}")
    if sides is not None:
        return Place(chip, _known_sides(chip, text, tuple(int(s) for s in sides.split("x") if s)), slices)
    chips, rest = divmod(int(count), chip.cores)
    found = next((s for s in torus_shapes(chip) if math.prod(s) == chips and not rest), None)
    if found is None:
        near = [Place(chip, s).cloud_name for s in _nearest(chip, max(chips, 1))]
        raise ConfigError(
            f"topology '{text}': {chip.name} comes in no slice of {int(count)} "
            f"{'cores' if chip.cores > 1 else 'chips'}; nearest: {' and '.join(near)}"
        )
    return Place(chip, found, slices)


def torus_shapes(chip: Chip) -> Iterator[tuple[int, ...]]:
    """Shapes that a slice comes in, smallest first; of those with as many chips, the one nearest a cube first."""
    if chip.torus == 2:
        yield from _PLANES[chip.name]
    elif chip.torus == 3:
        yield from _SMALL_TORUS
        most = _LARGEST[chip.name]
        sides = range(4, max(most) + 1, 4)
        cubes = [(a, b, c) for a in sides for b in sides for c in sides if a <= b <= c]
        fitting = [s for s in cubes if all(side <= limit for side, limit in zip(s, most, strict=True))]
        yield from sorted(fitting, key=lambda s: (math.prod(s), sum(s)))
    else:
        yield from ((n,) for n in range(1, 4097) if chip.platform == "cpu" or n <= _MOST_GPUS or n % _MOST_GPUS == 0)


def _known_sides(chip: Chip, text: str, sides: tuple[int, ...]) -> tuple[int, ...]:
    """`sides` if a slice of that shape exists, in whatever order they are given."""
    if len(sides) == max(chip.torus, 1) and tuple(sorted(sides)) in {tuple(sorted(s)) for s in torus_shapes(chip)}:
        return sides
    near = " and ".join(Place(chip, s).name for s in _nearest(chip, max(math.prod(sides), 1)))
    raise ConfigError(f"topology '{text}': {chip.name} comes in no slice of that shape; nearest: {near}")


def _nearest(chip: Chip, chips: int) -> list[tuple[int, ...]]:
    """The next smaller and the next larger shape."""
    shapes = list(torus_shapes(chip))
    below = [s for s in shapes if math.prod(s) <= chips]
    above = [s for s in shapes if math.prod(s) >= chips]
    ends = [max(below, key=math.prod)] if below else []
    ends += [min(above, key=math.prod)] if above else []
    return list(dict.fromkeys(ends))
