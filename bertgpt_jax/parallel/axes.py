"""The one table from logical axes, which models name, to mesh axes."""

from __future__ import annotations

import difflib

AXES = ("data", "fsdp", "pipe", "context", "tensor")
"""Mesh axes, outermost (slowest links) first: replicas, sharded parameters, pipeline, sequence, heads and width."""

Table = tuple[tuple[str, str | tuple[str, ...] | None], ...]
"""Rows of (logical axis, mesh axes it lies along)."""

LOGICAL_AXES: Table = (
    # activations
    ("rows", ("pipe", "data", "fsdp")),  # a batch outside the layers: stages share what is not theirs alone
    ("batch", ("data", "fsdp")),  # inside
    ("stages", "pipe"),
    ("length", "context"),
    ("predictions", "context"),  # masked positions, gathered from all over the row
    ("act_embed", None),  # batch already uses fsdp, and an array may use a mesh axis once
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
    # parameters
    ("layers", "pipe"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("positions", None),
    ("types", None),
    ("norm", None),
    ("classes", None),
)
"""Weights are split over fsdp by model width and over tensor by heads, feed-forward width or vocabulary (Megatron)."""

TOGETHER = (
    ("rows", "length", "act_embed"),
    ("rows", "length", "act_vocab"),
    ("rows", "predictions", "act_embed"),
    ("rows", "predictions", "act_vocab"),
    ("stages", "batch", "length", "act_embed"),
    ("stages", "batch", "length", "act_heads"),
    ("stages", "batch", "length", "act_mlp"),
    ("layers", "embed", "heads", "head_dim"),
    ("layers", "embed", "mlp"),
    ("layers", "norm"),
    ("vocab", "embed"),
    ("positions", "embed"),
    ("types", "embed"),
    ("embed", "act_embed"),
    ("embed", "classes"),
)
"""Logical axes that one array has; two of them cannot lie along one mesh axis."""


def table_problem(rows: tuple[tuple[str, tuple[str, ...]], ...]) -> str | None:
    """What is wrong with rows that replace rows of the table; None if nothing is."""
    names = [name for name, _ in LOGICAL_AXES]
    for name, axes in rows:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1, 0.5)
            return f"'{name}' is no logical axis; " + (f"did you mean '{close[0]}'?" if close else f"known: {names}")
        unknown = [axis for axis in axes if axis not in AXES]
        if unknown:
            return f"rule '{name}': '{unknown[0]}' is no mesh axis; known: {', '.join(AXES)}"
        if len(set(axes)) < len(axes):
            return f"rule '{name}' names a mesh axis twice: {', '.join(axes)}"
    given = [name for name, _ in rows]
    if len(set(given)) < len(given):
        return f"rule '{next(name for name in given if given.count(name) > 1)}' is given twice"
    table = {name: (axes,) if isinstance(axes, str) else axes or () for name, axes in replaced(rows)}
    for array in TOGETHER:
        for i, name in enumerate(array):
            for other in array[:i]:
                both = [axis for axis in table[name] if axis in table[other]]
                if both:
                    return (
                        f"rules '{other}' and '{name}' both lie along '{both[0]}', and an array has both; "
                        "it may use a mesh axis once"
                    )
    return None


def replaced(rows: tuple[tuple[str, tuple[str, ...]], ...]) -> Table:
    """The table with some rows replaced."""
    new = dict(rows)
    return tuple((name, (new[name] or None) if name in new else axes) for name, axes in LOGICAL_AXES)
