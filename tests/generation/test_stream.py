"""Streaming: whole characters, stop strings across tokens, nothing taken back."""

from __future__ import annotations

import itertools

import pytest

from bertgpt_jax.generation.stream import TextStream


def decode(ids) -> str:
    """Bytes as tokens."""
    return bytes(ids).decode("utf-8", "replace")


def pieces(text: str, size: int = 1, stops=(), prompt: str = "p") -> tuple[list[str], TextStream]:
    stream, data = TextStream(decode, list(prompt.encode()), stops), text.encode()
    shown = [stream.feed(list(data[i : i + size])) for i in range(0, len(data), size)]
    return [*shown, stream.finish()], stream


@pytest.mark.parametrize("text", ["plain", "caf\u00e9 \u4e2d\u6587 \U0001f600!", "\u00e9"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_only_whole_characters_are_shown(text: str, size: int) -> None:
    shown, stream = pieces(text, size)
    assert "".join(shown) == text == stream.text
    assert not any("\ufffd" in piece for piece in shown)


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    stream = TextStream(decode, [])
    assert stream.feed([65, 0xC3]) == "A" and stream.finish() == "\ufffd"


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("abcabd", ["abd"], "abc"),
        ("xENDy", ["D", "END"], "x"),
        ("ENDy", ["END"], ""),
        ("no stop EN", ["END"], "no stop EN"),
    ],
)
def test_stop_strings(text: str, stops: list[str], kept: str, size: int) -> None:
    shown, stream = pieces(text, size, stops)
    assert "".join(shown) == stream.text == kept
    assert (stream.stop is not None) == any(stop in text for stop in stops)


def test_what_may_begin_a_stop_string_waits() -> None:
    stream = TextStream(decode, [], ["\n\n"])
    assert [stream.feed([byte]) for byte in b"a\nb\n\nc"] == ["a", "", "\nb", "", "", ""]
    assert stream.text == "a\nb" and stream.stop == "\n\n"


def test_shown_text_grows_only() -> None:
    for letters in itertools.product("ab\n", repeat=5):
        text = "".join(letters)
        shown, stream = pieces(text, 1, ["ab\n", "bb"])
        assert "".join(shown) == stream.text and text.startswith(stream.text)


def test_pieces_are_spelt_in_the_context_of_the_prompt() -> None:
    """WordPiece: `##s` after `hello`."""
    words = {0: "hello", 1: "##s", 2: "you"}

    def spell(ids) -> str:
        return " ".join(words[i] for i in ids).replace(" ##", "")

    stream = TextStream(spell, [0])
    assert stream.feed([1]) == "s" and stream.feed([2]) == " you"
