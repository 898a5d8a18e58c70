"""Looking into a model from outside: what its result does when the vectors its layers read are moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn

from bertgpt_jax.shapes import Hidden


@contextmanager
def added_to_embeddings(delta_BTD: Hidden) -> Iterator[None]:
    """Inside, `embed` of a model gives its result plus `delta_BTD`, whose gradient is that of the embeddings."""

    def add(function: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        result = function(*args, **kwargs)
        return result + delta_BTD if context.method_name == "embed" else result

    with nn.intercept_methods(add):
        yield
