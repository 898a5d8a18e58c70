"""Special ids of a vocabulary: which exist, and that those of a purpose differ."""

from __future__ import annotations

import pytest

from bertgpt_jax.corpus.special import SpecialIds
from bertgpt_jax.errors import ConfigError


def test_ids_that_exist_once_each() -> None:
    assert SpecialIds(pad=3, sep=1, eot=1).ids() == (1, 3)


def test_ids_that_a_purpose_needs_exist_and_differ() -> None:
    ids = SpecialIds(pad=0, cls=3, sep=3)
    ids.require("pad", "cls", purpose="a row")
    with pytest.raises(ConfigError, match=r"a pair needs different ids for cls, sep, this vocabulary has \[3, 3\]"):
        ids.require("cls", "sep", purpose="a pair")
    with pytest.raises(ConfigError, match="masks needs the special tokens cls, mask; this vocabulary has no mask"):
        ids.require("cls", "mask", purpose="masks")
