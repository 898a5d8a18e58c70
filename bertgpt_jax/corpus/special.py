"""The special ids of a vocabulary."""

from __future__ import annotations

import dataclasses

from bertgpt_jax.errors import ConfigError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[EOT]")
"""Ids 0..5 of every vocabulary we train, of every kind: one byte-level BPE corpus serves RoBERTa and GPT alike."""


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens; None where a published vocabulary has no such token.

    `eot` ends every document in a token store. GPT-2's vocabulary has nothing else; BERT's has no token of its own for
    it, there it is `[SEP]`.
    """

    pad: int | None = None
    unk: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    eot: int | None = None

    def require(self, *names: str, purpose: str) -> None:
        """Raises ConfigError unless all `names` (`"cls"`, ...) exist and differ."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ConfigError(
                f"{purpose} needs the special tokens {', '.join(names)}; this vocabulary has no {', '.join(missing)}: "
                "train a tokenizer (tokenizer.path='') or load one that has them"
            )
        ids = [getattr(self, name) for name in names]
        if len(set(ids)) != len(ids):
            raise ConfigError(f"{purpose} needs different ids for {', '.join(names)}, this vocabulary has {ids}")

    def ids(self) -> tuple[int, ...]:
        """The ids that exist, each once, ascending."""
        return tuple(sorted({i for i in dataclasses.astuple(self) if i is not None}))


TRAINED_IDS = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4, eot=5)
