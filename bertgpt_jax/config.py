"""Configs: frozen pydantic models, loaded from Python or JSON files and changed by `key=value` overrides.

A config separates *identity* (what is trained: it is hashed into every checkpoint, and a change stops a resume)
from *execution* (how: mesh, intervals, workers), whose fields are annotated `Annotated[type, EXECUTION]`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import re
import sys
import traceback
import types
import typing
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bertgpt_jax.errors import ConfigError, UserError


class Config(BaseModel):
    """Base of every config: immutable, hashable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


@dataclasses.dataclass(frozen=True)
class _Execution:
    """Marker type of `EXECUTION`."""


EXECUTION = _Execution()
"""Marks a field that may change on resume: `workers: Annotated[int, EXECUTION] = 2`."""


@dataclasses.dataclass(frozen=True)
class _Added:
    """Marker type of `ADDED`."""


ADDED = _Added()
"""Marks a field younger than corpora and checkpoints that are to stay valid: at its default it is no part of the
identity, so theirs do not change: `split: Annotated[str, ADDED] = "train"`."""

C = TypeVar("C", bound=Config)


# ---------------------------------------------------------------- identity


def identity(config: Config) -> dict[str, Any]:
    """The JSON-ready tree of `config` without its execution fields; equal trees train the same thing."""
    tree = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if EXECUTION not in field.metadata and not (ADDED in field.metadata and value == field.default):
            tree[name] = _identity_value(value)
    return tree


def _identity_value(value: Any) -> Any:
    if isinstance(value, Config):
        return identity(value)
    if isinstance(value, tuple):
        return [_identity_value(v) for v in value]
    return value


def fingerprint(tree: Any) -> str:
    """sha256 (hex) of a JSON-ready tree in canonical form."""
    text = json.dumps(tree, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted paths at which two JSON-ready trees differ, each with (old value, new value); absent is None."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix: (old, new)}
    found = {}
    for key in [*old, *(k for k in new if k not in old)]:
        path = f"{prefix}.{key}" if prefix else str(key)
        found.update(differences(old.get(key), new.get(key), path))
    return found


# ---------------------------------------------------------------- building


def build(config_type: type[C], tree: Any, source: str) -> C:
    """Validates `tree` into a `config_type`; `ConfigError` lists all problems, each as `path = value: rule`."""
    try:
        return config_type.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, tree)}") from None


def explain(error: ValidationError, tree: Any = None) -> str:
    """All problems of a pydantic error on one line."""
    problems = error.errors()
    if len(problems) > 1:  # a tuple is also called too short when its items are wrong
        problems = [problem for problem in problems if problem["type"] != "too_short"] or problems
    return "; ".join(dict.fromkeys(_explain_one(problem, tree) for problem in problems))


def _explain_one(problem: Any, tree: Any) -> str:
    path, node = [], tree
    for part in problem["loc"]:
        if isinstance(node, dict) and part not in node and part in (node.get("kind", "single"), None):
            continue  # pydantic inserts the tag of a discriminated union into the location (a corpus may leave it out)
        path.append(str(part))
        known = isinstance(node, dict) and part in node
        indexed = isinstance(node, list | tuple) and isinstance(part, int) and part < len(node)
        node = node[part] if known or indexed else None
    rule = problem["msg"].removeprefix("Value error, ")
    rule = rule[:1].lower() + rule[1:] if rule.startswith("Input") else rule
    name = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{name}'"
    if problem["type"] == "union_tag_invalid":
        return _explain_kind(f"{name}.kind" if name else "kind", problem["ctx"])
    if not name:
        return rule
    shown = problem.get("input")
    if problem["type"] == "literal_error" and isinstance(shown, str):
        known = re.findall("'([^']*)'", problem["ctx"]["expected"])
        close = difflib.get_close_matches(shown, known, 1, 0.5)
        rule = f"did you mean '{close[0]}'? {rule}" if close else rule
    return f"{name}: {rule}" if isinstance(shown, dict | Config) else f"{name} = {shown!r}: {rule}"


def _explain_kind(name: str, context: dict[str, Any]) -> str:
    known = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
    close = difflib.get_close_matches(context["tag"], known, 1, 0.5)
    advice = f"did you mean '{close[0]}'? " if close else ""
    return f"{name} = '{context['tag']}': {advice}known: {', '.join(known)}"


def apply_overrides(config: C, overrides: list[str] | tuple[str, ...]) -> C:
    """A copy of `config` with `a.b=value` assignments, validated anew.

    Lists are addressed by index or by an item's `name` (`stages.0.steps=10`, `stages.phase1.steps=10`). `null` is None;
    JSON (`[...]`, `{...}`) is accepted for tuples and sub-configs. Setting a `kind` swaps the member of the union:
    fields of the same type that were not at their default are kept, the rest gets the new member's defaults. What is
    set whole comes before its parts, a `kind` before other fields, whatever the order of the overrides.

    Raises:
        ConfigError: listing every bad override at once.
    """
    tree = config.model_dump(mode="json")
    problems = []
    for item in sorted(overrides, key=_rank):
        problem = _assign(type(config), tree, item)
        if problem:
            problems.append(problem)
    if problems:
        raise ConfigError("; ".join(problems))
    return build(type(config), tree, "override")


def _rank(item: str) -> tuple[int, bool]:
    parts = item.partition("=")[0].strip().split(".")
    return len(parts), parts[-1] != "kind"


def _assign(config_type: Any, tree: Any, item: str) -> str | None:
    """Writes one override into `tree`; returns what is wrong with it, if anything."""
    key, equals, text = item.partition("=")
    if not equals:
        return f"override '{item}' has no '='; write key=value"
    node, hint = tree, config_type
    parts = key.strip().split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            names = [str(v.get("name")) if isinstance(v, dict) else "" for v in node]
            if part in names:
                part = str(names.index(part))
            if not part.isdigit() or int(part) >= len(node):
                return f"'{key}': '{part}' is no item of '{'.'.join(parts[:depth])}' (0..{len(node) - 1}: {names})"
            position: Any = int(part)
        elif isinstance(node, dict) and part in (fields := _fields(hint, node)):
            position = part
            node.setdefault(part, _default(fields[part]))
        else:
            known = list(_fields(hint, node)) if isinstance(node, dict) else []
            close = difflib.get_close_matches(part, known, 1, 0.5)
            advice = f"did you mean '{'.'.join([*parts[:depth], close[0]])}'?" if close else f"known: {known}"
            return f"unknown key '{key}'; {advice}"
        if depth == len(parts) - 1:
            if part == "kind" and text != node.get("kind"):
                _swap_kind(hint, node, text)
            else:
                node[position] = _parse_value(text)
            return None
        hint = _hint_below(hint, position)
        node = node[position]
    return None


def _parse_value(text: str) -> Any:
    stripped = text.strip()
    if stripped in ("null", "None"):  # `none` is a value of some settings
        return None
    if stripped[:1] in ("[", "{", '"'):
        try:
            return parse_json(stripped, "override")
        except ConfigError:
            return text
    return text


def _members(hint: Any) -> list[type[Config]]:
    """The Config classes that a type hint admits."""
    if isinstance(hint, type) and issubclass(hint, Config):
        return [hint]
    if isinstance(hint, type) and not typing.get_args(hint):
        return []
    return [m for arg in typing.get_args(hint) for m in _members(arg)]


def _fields(hint: Any, node: dict[str, Any]) -> dict[str, FieldInfo]:
    """The fields of the member of a hint that `node` is of, or of all where its `kind` tells nothing."""
    members = [m.model_fields for m in _members(hint)]
    mine = [fields for fields in members if "kind" in fields and fields["kind"].default == node.get("kind")]
    return {name: field for fields in mine or members for name, field in fields.items()}


def _default(field: FieldInfo) -> Any:
    """What a field that was left out is, JSON-ready; None if it has to be given."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    return None if value is PydanticUndefined else list(value) if isinstance(value, tuple) else value


def _hint_below(hint: Any, key: Any) -> Any:
    if isinstance(key, int):
        return hint
    hints = [typing.get_type_hints(m, include_extras=False).get(key) for m in _members(hint)]
    hints = [h for h in hints if h is not None]
    return typing.Union[tuple(hints)] if hints else None  # noqa: UP007 (built from a runtime list)


def _swap_kind(hint: Any, node: dict[str, Any], kind: str) -> None:
    members = {m.model_fields["kind"].default: m.model_fields for m in _members(hint) if "kind" in m.model_fields}
    new, old = members.get(kind), members.get(node.get("kind"), {})
    if new is not None:
        shared = [k for k in node if k in new and k in old and new[k].annotation == old[k].annotation]
        kept = {k: node[k] for k in shared if node[k] != _default(old[k])}
        node.clear()
        node.update(kept)
    node["kind"] = kind


# ---------------------------------------------------------------- files


def to_json(config: Config) -> str:
    """`config` as JSON text that `load_config` reads back to an equal config."""
    return config.model_dump_json(indent=2) + "\n"


def parse_json(text: str, source: str) -> Any:
    """JSON with what json.loads lets through refused: duplicate keys, NaN and Infinity."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(items)
        if len(tree) < len(items):
            twice = next(key for key, count in Counter(key for key, _ in items).items() if count > 1)
            raise ConfigError(f"{source}: key '{twice}' is given twice; keep one")
        return tree

    def constant(name: str) -> None:
        raise ConfigError(f"{source}: {name} is not a JSON number; write a finite number or null")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}:{error.lineno}: not JSON ({error.msg}); comments are not allowed") from None


def shipped_configs() -> dict[str, Path]:
    """Name (`bert/base`) to file of the configs that come with the package, in a checkout or a wheel."""
    package = Path(__file__).parent
    for root in (package / "configs", package.parent / "configs"):
        if root.is_dir():
            files = sorted(p for p in root.rglob("*.py") if p.name != "__init__.py")
            return {p.relative_to(root).with_suffix("").as_posix(): p for p in files}
    return {}


def load_config(name: str, config_type: type[C], overrides: list[str] | tuple[str, ...] = ()) -> C:
    """Loads a config by path (`.py` with `get_config()`, or `.json`, which never executes) or shipped name.

    Raises:
        ConfigError: with the nearest name for a typo, file and line for a broken file, all validation problems.
    """
    path = Path(name).expanduser()
    shipped = shipped_configs()
    if not path.is_file():
        if name in shipped:
            path = shipped[name]
        else:
            nearby = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
            close = difflib.get_close_matches(name, [*nearby, *shipped], 1, 0.4)
            advice = f"did you mean '{close[0]}'?" if close else f"shipped: {', '.join(shipped)}"
            raise ConfigError(f"config '{name}' not found; {advice}")
    if path.suffix == ".json":
        config = build(config_type, parse_json(_read_text(path), str(path)), str(path))
    elif path.suffix == ".py":
        config = _run_python(path, config_type)
    else:
        raise ConfigError(f"config '{name}' must end in .py or .json")
    return apply_overrides(config, overrides) if overrides else config


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start})") from None


def _run_python(path: Path, config_type: type[C]) -> C:
    if path.stat().st_mode & 0o002:
        print(f"warning: {path} is writable by everyone, and a Python config runs as code", file=sys.stderr)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, "get_config", None)
        if not isinstance(function, types.FunctionType):
            raise ConfigError(f"{path} must define get_config()")
        config = function()
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from None
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}:{error.lineno}: {error.msg}") from None
    except UserError:
        raise
    except Exception as error:  # a config is a program: whatever it raises is the user's, with its line
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = frames[-1].lineno if frames else 0
        raise ConfigError(f"{path}:{line}: {type(error).__name__}: {error}") from None
    if not isinstance(config, config_type):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}, not {config_type.__name__}")
    return config
