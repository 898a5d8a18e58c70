"""Sentence splitting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertgpt_jax.corpus.sentences import split_sentences

CASES = {
    "english": ["Mr. Cassius stopped at 4 A. M. in the U.S. embassy.", ' He said "Go!" and left.', ' "What?" he asked.',
                " She left... then came back.", " See Fig. 3 by J. R. R. Tolkien.", " 3.14 is pi!", " Is it?"],
    "starters": ["It is in the U.S.", " The law differs.", " He has a Ph.D.", " But why?"],
    "chinese": ["左闕無存。", "現存右闕！", "「好。」", "他說？", "是"],
    "hindi": ["यह एक वाक्य है।", " दूसरा वाक्य॥", " तीसरा"],
    "arabic": ["هل هذا سؤال؟", " نعم.", " هذا جواب۔", " ختم"],
    "ethiopic": ["ሰላም።", " እንዴት ነህ፧", " ደህና"],
    "armenian": ["Բարեւ։", " Ինչպես ես։", " Լավ"],
    "burmese": ["မင်္ဂလာပါ။", " နေကောင်းလား။", " ကောင်းပါတယ်"],
    "list": ["1. First item", "\n2. Second item"],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_ends_of_sentences(name):
    assert split_sentences("".join(CASES[name]), "split", wrapped=False) == CASES[name]


def test_wrapped_lines_belong_together_until_a_blank_line():
    text = "A sentence over\ntwo lines.  Another one\nwithout end\n\nA paragraph"
    assert split_sentences(text, "split", wrapped=True) == [
        "A sentence over\ntwo lines.",
        "  Another one\nwithout end",
        "\n\nA paragraph",
    ]


def test_lines_and_none():
    assert split_sentences("one. two\n\nthree\n", "line", False) == ["one. two", "\n\nthree\n"]
    assert split_sentences("one. two\nthree", "none", False) == ["one. two\nthree"]
    assert split_sentences("", "none", False) == []


PIECES = st.sampled_from(list("ab A.?!…。।\n\t\"'”)(1") + ["U.S.", "Mr. ", "\n\n", " \n", "e.g. "])


@given(
    st.one_of(st.text(), st.lists(PIECES, max_size=60).map("".join)), st.sampled_from(["line", "split"]), st.booleans()
)
def test_sentences_partition_the_text(text, mode, wrapped):
    sentences = split_sentences(text, mode, wrapped)
    assert "".join(sentences) == text
    if len(sentences) > 1:
        assert all(s.strip() for s in sentences)


def test_a_long_text_is_split_in_linear_time():
    import time

    text = "word. " * 200_000 + "no end " * 200_000 + "." * 100_000 + "\"'" * 100_000
    started = time.monotonic()
    split_sentences(text, "split", wrapped=True)
    assert time.monotonic() - started < 10
