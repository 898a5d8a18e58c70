"""Optimized HLO as XLA prints it (`compiled.as_text()`): computations, what they call, how large shapes are."""

from __future__ import annotations

import dataclasses
import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
"""Opcodes of what devices send each other; asynchronous ones end in `-start`."""

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Line:
    """An instruction.

    Attributes:
        shape: of the result, as printed: `f32[8]{0}` or a whole tuple.
        rest: what follows the opcode's opening parenthesis.
    """

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def collective(self) -> str | None:
        """The kind of collective that this is or starts; None if it is none."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results this takes."""
        return _OPERAND.findall(self.rest.partition(")")[0])


Computations = dict[str, list[Line]]


def parse(text: str) -> tuple[Computations, str]:
    """The instructions of each computation, and the entry's name."""
    found: Computations = {}
    entry, lines = "", []
    for row in text.splitlines():
        if row and not row[0].isspace():
            header = _HEADER.match(row)
            if header and not row.startswith("HloModule"):
                lines = found[header[2]] = []
                entry = header[2] if header[1] else entry
        elif name := _NAME.match(row):
            shape, rest = _split_shape(row[name.end() :])
            opcode, _, rest = rest.partition("(")
            lines.append(Line(name[1], shape, opcode, rest))
    return found, entry


def _split_shape(text: str) -> tuple[str, str]:
    """(the shape, the rest) of what follows `name = `."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for i, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return text[: i + 1], text[i + 2 :]
    return text, ""


def called(line: Line) -> list[str]:
    """Computations that an instruction runs, but for the condition of a loop."""
    found = _CALLED.findall(line.rest)
    for group in _CALLED_LISTS.findall(line.rest):
        found += [part.strip().lstrip("%") for part in group.split(",")]
    return found


def in_loops(computations: Computations) -> set[str]:
    """Computations that run inside the body of a loop, whatever the depth."""
    pending = [name for lines in computations.values() for x in lines if x.opcode == "while" for name in called(x)]
    inside: set[str] = set()
    while pending:
        name = pending.pop()
        if name in computations and name not in inside:
            inside.add(name)
            pending += [inner for line in computations[name] for inner in called(line)]
    return inside


def arrays(shape: str) -> list[tuple[str, int]]:
    """(dtype as printed, elements) of every array of a shape."""
    plain = re.sub(r"\{[^{}]*\}", "", shape)  # without layouts
    return [(dtype, math.prod(int(n) for n in sizes.split(",") if n)) for dtype, sizes in _ARRAY.findall(plain)]


def array_bytes(shape: str) -> list[int]:
    """Bytes of every array of a shape."""
    return [elements * _bits(dtype) // 8 for dtype, elements in arrays(shape)]


def _bits(dtype: str) -> int:
    """Of one element: what its name says (`f32`, `s4`, `f8e4m3fn`), but for the names that do not."""
    width = re.search(r"\d+", dtype)
    return _BITS.get(dtype, int(width[0]) if width else 0)


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays of a shape."""
    return sum(array_bytes(shape))
