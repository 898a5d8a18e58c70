"""The letters that tensor names and annotations are spelt with, for the whole package.

    B  batch            T  query length / sequence    S  key length
    D  model width      N  attention heads            H  head width
    F  feed-forward     V  vocabulary                 L  layers
    P  predictions a row (masked positions)          K  segments a packed row

`x_BTD` is an array of those dimensions in that order. Logical axis names (`embed`, `heads`, ...) of the same dimensions
are mapped to the mesh in `parallel/axes.py`.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int, PyTree

Tokens = Int[Array, "B T"]
"""Token ids, positions, segment or type ids of a batch."""

Hidden = Float[Array, "B T D"]
"""The residual stream."""

Heads = Float[Array, "B T N H"]
"""Queries, keys or values, one vector a head."""

Logits = Float[Array, "B T V"]
"""Unnormalised log-probabilities over the vocabulary."""

Params = PyTree[Float[Array, "..."]]
"""Nested dicts of parameters; layers are stacked on a leading axis under `layers`."""

__all__ = ["Array", "Float", "Heads", "Hidden", "Int", "Logits", "Params", "PyTree", "Tokens"]
