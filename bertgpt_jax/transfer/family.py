"""What a model family of `transformers` needs: names, config.json both ways, and what it cannot express."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from bertgpt_jax.corpus.special import SpecialIds
from bertgpt_jax.errors import ConfigError, DataError
from bertgpt_jax.transfer.names import Name
from bertgpt_jax.transfer.source import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type` of config.json.

    Attributes:
        model_type: as in config.json.
        prefix: of the tensor names below the heads; directories of the bare model leave it out.
        names: (our config, special ids) -> every parameter's place.
        shared: our config -> their tensor that repeats another of theirs (a tied head) -> that other.
        zeros: our config -> tensors of theirs that ours has no parameters for, all zero, with their shapes.
        ignored: regexes of tensors that are no parameters (masks kept as buffers).
        obstacles: our config -> everything that stands in the way of writing it as this family.
        to_config: (our config, special ids) -> the tree of config.json.
        from_config: (config.json, names of the tensors) -> the tree of our config.
    """

    model_type: str
    prefix: str
    names: Callable[[ModelConfig, SpecialIds], Sequence[Name]]
    shared: Callable[[ModelConfig], dict[str, str]]
    zeros: Callable[[ModelConfig], dict[str, tuple[int, ...]]]
    ignored: tuple[str, ...]
    obstacles: Callable[[ModelConfig], list[str]]
    to_config: Callable[[ModelConfig, SpecialIds], dict[str, Any]]
    from_config: Callable[[dict[str, Any], set[str]], dict[str, Any]]

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor is none of the parameters."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def wanted(config: ModelConfig, **fields: tuple[Any, ...]) -> list[str]:
    """What a config has that is not among the values its family knows: `model.norm_position = 'pre' (only 'post')`."""
    found = []
    for name, allowed in fields.items():
        value = getattr(config, name)
        if value not in allowed:
            found.append(f"model.{name} = {value!r} (only {' or '.join(map(repr, allowed))})")
    return found


def unknown_fields(config: ModelConfig, known: set[str]) -> list[str]:
    """Fields outside `known` that are not at their default: additions to the model that no family here writes."""
    found = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name not in known and value != field.get_default(call_default_factory=True):
            found.append(f"model.{name} = {value!r} (no counterpart)")
    return found


TRAINING_ONLY = {"kind", "initializer", "initializer_range", "position_initializer_range", "residual_initializer"}
"""Fields that say how parameters are drawn, not what is computed with them."""


def need(tree: dict[str, Any], kinds: dict[str, type | tuple[type, ...]], source: str) -> dict[str, Any]:
    """The named entries of a config.json.

    Raises:
        DataError: listing all that are missing or of another type.
    """
    problems = []
    for name, kind in kinds.items():
        value = tree.get(name)
        if value is None:
            problems.append(f"'{name}' is missing")
        elif isinstance(value, bool) and kind is not bool or not isinstance(value, kind):
            problems.append(f"'{name}' = {value!r} has the wrong type")
    if problems:
        raise DataError(f"{source}: {'; '.join(problems)}")
    return {name: tree[name] for name in kinds}


def refuse_settings(tree: dict[str, Any], only: dict[str, tuple[Any, ...]], source: str) -> None:
    """Raises ConfigError, listing all, for settings of a config.json that change what is computed and are not ours."""
    problems = []
    for name, allowed in only.items():
        value = tree.get(name, allowed[0])
        if value not in allowed:
            problems.append(f"{name} = {value!r} (only {' or '.join(map(repr, allowed))})")
    if problems:
        raise ConfigError(f"{source}: this model has what ours cannot express: {'; '.join(problems)}")


def choose_activation(name: Any, table: dict[str, str], source: str) -> str:
    """Our name of an activation of theirs."""
    if name not in table:
        raise ConfigError(f"{source}: activation '{name}' is not ours; known: {', '.join(table)}")
    return table[name]


def token_ids(special: SpecialIds, **roles: int | None) -> dict[str, int]:
    """`pad_token_id` and the other ids of config.json that exist."""
    ids = {"pad": special.pad} | roles
    return {f"{role}_token_id": i for role, i in ids.items() if i is not None}
