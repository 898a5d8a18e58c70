"""Our parameter paths and another program's tensor names: one row a parameter, read by export and import alike.

A row says where a parameter of ours lies in theirs. Ours are stacked over layers, theirs are one tensor a layer; ours
keep heads apart, theirs are matrices; ours are [input, output], a `linear` of theirs is [output, input]; query, key and
value may be parts of one tensor.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

Layout = Literal["same", "flat", "linear", "conv"]


@dataclasses.dataclass(frozen=True)
class Name:
    """A parameter's place.

    Attributes:
        ours: path without the `layers/` axis spelt out (`layers/attention/query/kernel`).
        theirs: tensor name, with `{i}` for the layer where ours is stacked.
        layout: `same`; `flat` (all dimensions in one: biases of heads); `linear` ([output, input], torch.nn.Linear);
            `conv` ([input, output], transformers' Conv1D).
        inputs: how many leading dimensions of ours are inputs (2 for the kernel that joins heads).
        part: which third of their tensor's output dimension, for a fused query, key and value.
        skipped_rows: leading rows of ours that theirs lacks; if negative, leading rows of theirs that ours lacks.
    """

    ours: str
    theirs: str
    layout: Layout = "same"
    inputs: int = 1
    part: int | None = None
    skipped_rows: int = 0

    @property
    def stacked(self) -> bool:
        """Whether ours has a leading axis of layers."""
        return "{i}" in self.theirs

    def full_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of their tensor, for the shape of ours without the layer axis."""
        if self.layout == "same":
            return (shape[0] - self.skipped_rows, *shape[1:])
        parts = 1 if self.part is None else 3
        if self.layout == "flat":
            return (parts * math.prod(shape),)
        inputs, outputs = math.prod(shape[: self.inputs]), parts * math.prod(shape[self.inputs :])
        return (outputs, inputs) if self.layout == "linear" else (inputs, outputs)

    def region(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The part of their tensor that is ours."""
        if self.skipped_rows < 0:
            return (slice(-self.skipped_rows, None),)
        if self.part is None:
            return (slice(None),)
        size = math.prod(shape) if self.layout == "flat" else math.prod(shape[self.inputs :])
        mine = slice(self.part * size, (self.part + 1) * size)
        return (slice(None), mine) if self.layout == "conv" else (mine,)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Our array (of one layer) as `region` of theirs holds it; a view where that is possible."""
        if self.layout == "same":
            return array[max(self.skipped_rows, 0) :] if self.skipped_rows else array
        if self.layout == "flat":
            return array.reshape(-1)
        matrix = array.reshape(math.prod(array.shape[: self.inputs]), -1)
        return matrix.T if self.layout == "linear" else matrix

    def to_ours(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """`region` of their tensor as our array of `shape`; a view where that is possible."""
        if self.layout == "same":
            rows = np.zeros((max(self.skipped_rows, 0), *shape[1:]), array.dtype)
            return np.concatenate([rows, array]) if len(rows) else array
        return (array.T if self.layout == "linear" else array).reshape(shape)


def norm(ours: str, theirs: str) -> list[Name]:
    """A layer norm: scale and bias."""
    return [Name(f"{ours}/scale", f"{theirs}.weight"), Name(f"{ours}/bias", f"{theirs}.bias")]


def linear(ours: str, theirs: str, layout: Layout = "linear", inputs: int = 1, part: int | None = None) -> list[Name]:
    """A projection: kernel and bias."""
    return [
        Name(f"{ours}/kernel", f"{theirs}.weight", layout, inputs, part),
        Name(f"{ours}/bias", f"{theirs}.bias", "flat", part=part),
    ]


def one_layer(shape: tuple[int, ...], name: Name) -> tuple[int, ...]:
    """Shape of ours without its layer axis."""
    return shape[1:] if name.stacked else shape
