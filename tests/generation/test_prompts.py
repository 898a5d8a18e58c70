"""Prompts as ids, and what is refused."""

from __future__ import annotations

import pytest

from bertgpt_jax.corpus.characters import Characters
from bertgpt_jax.errors import DataError, UsageError
from bertgpt_jax.generation.prompts import document_start, encode_prompts, parse_ids

LETTERS = Characters("abc ")


def test_ids() -> None:
    assert [row.tolist() for row in encode_prompts(LETTERS, ["ab", "c"])] == [[7, 8], [9]]


def test_unknown_characters_are_named() -> None:
    with pytest.raises(DataError, match=r"prompt 2: the vocabulary has no tokens for '\u00e9', '7'; .* read \[UNK\]"):
        encode_prompts(LETTERS, ["a", "b\u00e9 7b"])
    assert encode_prompts(LETTERS, ["b7"], allow_unknown=True)[0].tolist() == [8, 1]


def test_an_empty_prompt() -> None:
    with pytest.raises(UsageError, match=r"prompt 2 \(''\) is empty"):
        encode_prompts(LETTERS, ["a", ""])


def test_the_start_of_a_document() -> None:
    assert document_start(LETTERS).tolist() == [LETTERS.special.eot]


def test_ids_by_hand() -> None:
    assert parse_ids("0 2, 1", 3).tolist() == [0, 2, 1]
    for bad, named in (("0 3", "'3'"), ("-1", "'-1'"), ("x", "'x'"), (" ", "no id")):
        with pytest.raises(UsageError, match=named):
            parse_ids(bad, 3)
