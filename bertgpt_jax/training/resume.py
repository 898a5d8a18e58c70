"""Whether a workdir may be trained on with a config: identity is compared, execution may change."""

from __future__ import annotations

from typing import Any

from etils import epath

from bertgpt_jax.config import Config, differences, fingerprint, identity
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.training import storage
from bertgpt_jax.training.checkpoint_files import list_steps

CONFIG_FILE = "config.json"
IDENTITY_FILE = "identity.json"


def run_identity(config: Config, corpus_fingerprint: str, tokenizer_sha256: str) -> dict[str, Any]:
    """What is trained, as a JSON tree: the config's identity and the content of its data."""
    return {"config": identity(config), "corpus": corpus_fingerprint, "tokenizer": tokenizer_sha256}


def check_identity(
    workdir: epath.Path, new: dict[str, Any], allowed: tuple[str, ...] = (), from_step: int | None = None
) -> dict[str, tuple[Any, Any]]:
    """Compares with the identity a workdir was begun with; returns the allowed differences, to be logged.

    The schedule of a mixture may grow at its end by steps that are not done yet.

    Args:
        new: `run_identity`, or its `config` alone while the data is not open yet; a null there is not yet decided and
            differs from nothing.
        allowed: dotted paths (or prefixes of paths) that may differ.
        from_step: the checkpoint to go on from; None: the newest.

    Raises:
        ConfigError: with a diff of all other differences.
    """
    old = storage.read_json(workdir / IDENTITY_FILE)
    if old is None:
        return {}
    changed = differences({name: old.get(name) for name in new}, new)
    if "corpus" not in new:
        changed = {path: pair for path, pair in changed.items() if pair[1] is not None}
    changed = {path.removeprefix("config."): pair for path, pair in changed.items()}
    refused = {path: pair for path, pair in changed.items() if not any(_covers(name, path) for name in allowed)}
    added = [path for path, pair in refused.items() if is_added(path, pair)]
    done = max(list_steps(workdir), default=0) if added and from_step is None else from_step
    refused = {path: pair for path, pair in refused.items() if path not in added or pair[1]["from_step"] < done}
    if refused:
        diff = "; ".join(f"{path}: {_short(old)} -> {_short(new)}" for path, (old, new) in refused.items())
        names = ",".join(refused)
        diff += f" (what is added must begin at step {done} or later)" if set(added) & set(refused) else ""
        raise ConfigError(
            f"workdir '{workdir}' trains something else: {diff}; use another --workdir, or --allow-change {names}"
        )
    return changed


def is_added(path: str, change: tuple[Any, Any]) -> bool:
    """Whether a difference is an entry more in a mixture's schedule."""
    return path.startswith("corpus.schedule.") and change[0] is None and isinstance(change[1], dict)


def _short(value: Any) -> str:
    """A value as a message shows it; of a sha256 its first digits."""
    is_digest = isinstance(value, str) and len(value) == 64 and " " not in value
    return value[:12] if is_digest else repr(value)


def _covers(name: str, path: str) -> bool:
    return path == name or path.startswith(name + ".")


def identity_hash(tree: dict[str, Any]) -> str:
    """sha256 of an identity, as checkpoints carry it."""
    return fingerprint(tree)
