"""Collectives of a compiled program, read from its optimized HLO text: kind, mesh axes, bytes, how often they run.

XLA prints a loop's body once; what is in it counts as often as the loop turns. A collective that is fused with
computation is printed three times (start, middle, end) under one channel, and counts once. What TPU slices send each
other is printed as transfers to the host, whose runtime (Megascale) does the collective.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from bertgpt_jax.parallel.hlo_text import Computations, Line, called, parse, shape_bytes

_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives alike, summed over a step.

    Attributes:
        kind: `all-gather`, ...
        axes: mesh axes that take part; empty if they could not be told.
        count: how often such a one runs in a step.
        sent: bytes that a device sends in a step, over the links of those axes.
        network: between slices, over the data-centre network instead.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    sent: float
    network: bool = False


def collectives(text: str, mesh_shape: Mapping[str, int], slices: Mapping[str, int] | None = None) -> list[Collective]:
    """What a program of one step sends, most bytes first.

    Args:
        text: `compiled.as_text()`.
        mesh_shape: axis name to size, in the order in which the program's partitions are numbered.
        slices: axis name to how many slices it spans (`MeshConfig.across_slices`).
    """
    computations, entry = parse(text)
    return sorted(_inside(computations, entry, mesh_shape) + _between(computations, entry, slices or {}), key=_less)


def _less(one: Collective) -> float:
    return -one.sent


def _between(computations: Computations, entry: str, slices: Mapping[str, int]) -> list[Collective]:
    """What slices send each other."""
    axes, count = tuple(axis for axis, n in slices.items() if n > 1), math.prod(slices.values())
    total: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for _, line, times in _walk(computations, entry, 1):
        kind = _BETWEEN_SLICES.search(line.rest) if line.opcode == "send" else None
        if kind:
            name, own = kind[1].lower().replace("_", "-"), shape_bytes(_parts(line.shape)[0])
            share = {"all-reduce": 2 / count, "reduce-scatter": 1 / count, "all-gather": 1.0}.get(name)
            total[name][0] += times
            total[name][1] += times * own * (1.0 if share is None else share * (count - 1))
    return [Collective(name, axes, int(n), sent, True) for name, (n, sent) in total.items()]


def _inside(computations: Computations, entry: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """What the chips of a slice send each other."""
    seen: dict[tuple, tuple[tuple, float, int]] = {}
    for computation, line, times in _walk(computations, entry, 1):
        kind = line.collective
        if kind is None or times == 0:
            continue
        group = _group(line.rest, math.prod(mesh_shape.values()))
        axes = _varying(group, mesh_shape)
        if computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter-of-all-reduce"
        each = _sent(kind, line, len(group[0]) if group else 2)
        channel = re.search(r"\bchannel_id=(\d+)", line.rest)
        key = ("channel", channel[1]) if channel else ("line", len(seen))
        shown = "reduce-scatter" if kind.startswith("reduce-scatter") else kind
        if times > seen.get(key, (None, 0, 0))[2]:
            seen[key] = ((shown, axes), each, times)
    total: dict[tuple, list[float]] = defaultdict(lambda: [0, 0.0])
    for what, each, times in seen.values():
        total[what][0] += times
        total[what][1] += each * times
    return [Collective(kind, axes, int(count), sent) for (kind, axes), (count, sent) in total.items()]


def attention_kernels(text: str) -> tuple[int, int]:
    """How often a step runs a fused attention kernel, forward and backward: cuDNN's on GPUs, Pallas' on TPUs."""
    computations, entry = parse(text)
    forward = backward = 0
    for _, line, times in _walk(computations, entry, 1):
        target = re.search(r'custom_call_target="([^"]*)"', line.rest) if line.opcode == "custom-call" else None
        if target and "fmha" in target[1]:
            back = "Backward" in target[1]
        elif target and target[1] == "tpu_custom_call":
            back = "fwd" not in line.name
        else:
            continue
        forward, backward = forward + times * (not back), backward + times * back
    return forward, backward


# ---------------------------------------------------------------- how often


def _walk(computations: Computations, name: str, times: int) -> Iterator[tuple[str, Line, int]]:
    """Every line below a computation, with the computation it is in and how often it runs."""
    for line in computations.get(name, ()):
        yield name, line, times
        if line.opcode.endswith(("-done", "-update")):
            continue
        turns = times * _trips(computations, line) if line.opcode == "while" else times
        for inner in called(line):
            yield from _walk(computations, inner, turns)


def _trips(computations: Computations, line: Line) -> int:
    """Turns of a loop: as XLA says, or the constant that its condition compares its counter with."""
    known = _TRIPS.search(line.rest)
    if known:
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", line.rest)
    limits = [
        int(match[1])
        for _, inner, _ in _walk(computations, condition[1] if condition else "", 1)
        if inner.opcode == "constant" and (match := re.match(r"(\d+)\)", inner.rest))
    ]
    return max(limits, default=1)


# ---------------------------------------------------------------- who takes part


def _group(rest: str, devices: int) -> list[list[int]]:
    """Partition numbers of one group that communicates; of a permutation, its pairs; [] if it cannot be read."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", rest)
    if pairs:
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    explicit = re.search(r"replica_groups=\{(\{[\d,]+\})", rest)
    if explicit:
        return [[int(n) for n in explicit[1].strip("{}").split(",")]]
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if iota:
        return [_iota(iota[1])[0].tolist()]
    named = re.search(r"replica_groups=(mesh\[.*?\]).*?\{([^}]*)\}", rest)
    if named:
        return _named_group(rest[named.start(1) : named.end()], named[2])
    return [list(range(devices))] if re.search(r"replica_groups=\{\}", rest) else []


def _iota(text: str) -> np.ndarray:
    """`[4,2]<=[2,4]T(1,0)` as an array of partition numbers."""
    shape, _, source = text.partition("<=")
    dimensions, _, order = source.partition("T")
    sizes = [int(n) for n in re.findall(r"\d+", dimensions)]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    if order:
        numbers = numbers.transpose([int(n) for n in re.findall(r"\d+", order)])
    return numbers.reshape([int(n) for n in re.findall(r"\d+", shape)])


def _named_group(mesh: str, over: str) -> list[list[int]]:
    """The first group of `mesh['a'=16,'b'=4] {'a'}`; part of an axis is written `'a':(2)4`: 2 parts before, 4 here."""
    axes = re.findall(r"'([^']+)'=(\d+)", mesh)
    sizes = [int(size) for _, size in axes]
    order = re.search(r"device_ids=\(?(\[[\d,]+\](?:<=\[[\d,]+\])?(?:T\([\d,]+\))?)", mesh)
    numbers = np.arange(math.prod(sizes))
    if order:
        text = order[1] if "<=" in order[1] else f"[{numbers.size}]<={order[1]}"
        numbers = _iota(text).reshape(-1)
    numbers = numbers.reshape(sizes)
    index: list[slice | int] = [0] * len(sizes)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        place = next((i for i, (axis, _) in enumerate(axes) if axis == name), None)
        if place is None:
            return []
        stride = sizes[place] // (int(before) * int(size)) if before else 1
        index[place] = slice(0, (int(size) if before else sizes[place]) * stride, stride)
    return [np.atleast_1d(numbers[tuple(index)]).reshape(-1).tolist()]


def _varying(groups: list[list[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Axes along which the members of a group differ."""
    sizes, varying = tuple(mesh_shape.values()), set()
    for group in groups:
        if group and max(group) < math.prod(sizes):
            places = np.array(np.unravel_index(np.array(group), sizes))
            varying |= set(np.flatnonzero((places != places[:, :1]).any(1)).tolist())
    return tuple(axis for i, axis in enumerate(mesh_shape) if i in varying)


# ---------------------------------------------------------------- how much


def _sent(kind: str, line: Line, members: int) -> float:
    """Bytes that one device sends in one run: what the best algorithm on a ring sends."""
    size, share = shape_bytes(_result(line)), (members - 1) / members
    return {
        "all-gather": size * share,
        "all-reduce": 2 * size * share,
        "reduce-scatter": size * (members - 1),
        "reduce-scatter-of-all-reduce": size * share,
        "collective-permute": size,
    }.get(kind, size * share)


def _result(line: Line) -> str:
    """The part of a shape that is the result: an asynchronous start gives (operands, results, ...)."""
    if not line.opcode.endswith("-start") or line.opcode == "all-reduce-start" or not line.shape.startswith("("):
        return line.shape
    parts = _parts(line.shape)
    return parts[1] if len(parts) > 1 else line.shape


def _parts(shape: str) -> list[str]:
    """The members of a tuple; a shape that is none, alone."""
    if not shape.startswith("("):
        return [shape]
    depth, parts = 0, [""]
    for letter in shape[1:-1]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
