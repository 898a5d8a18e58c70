"""Where sentences start, in the scripts of the world; no models, no word lists beyond English abbreviations."""

from __future__ import annotations

import re

# Marks that end a sentence whatever follows: Chinese and Japanese, Devanagari and its neighbours (danda), Arabic
# question mark and Urdu full stop, Ethiopic full stop and question mark, Armenian, Burmese, Khmer, Tibetan.
_HARD = "。！？｡।॥؟۔።፧։။។៕༎"
# Marks that end one if white space and no lower-case letter follow.
_SOFT = ".!?…．"
_CLOSERS = "\"'”’»›)\\]}」』）】》〉"
_OPENERS = "\"'“‘«‹([{「『（【《〈¿¡-–—*_"
_PARAGRAPH = {True: r"[ \t]*(?=\n)()", False: "()"}
_ENDS = {  # a first character from one set lets `re` skip the rest; possessive, so linear in the worst text
    wrapped: re.compile(
        rf"[{_HARD}{_SOFT}\n](?:"
        rf"(?<=[{_HARD}])[{_HARD}{_SOFT}]*+[{_CLOSERS}]*+()"
        rf"|(?<=[{_SOFT}])(?<![{_SOFT}]{{2}})[{_SOFT}]*+[{_CLOSERS}]*+(?=\s++[{re.escape(_OPENERS)}]*+(\w*+))"
        rf"|(?<=\n){paragraph})"
    )
    for wrapped, paragraph in _PARAGRAPH.items()
}
"""Sentence ends: group 1 after a hard mark, 2 (the next word) after soft ones, 3 at the end of a paragraph."""
_BEFORE = re.compile(r"[\s(\[{\"'“‘—–-]")

_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof rev hon st sr jr gen col capt lt sgt cmdr gov sen rep pres mt ft no nos vol vols fig figs pp p "
    "ed eds al vs cf ca approx dept univ inc ltd co corp bros est jan feb mar apr jun jul aug sep sept oct nov dec mon "
    "tue wed thu fri sat sun e.g i.e viz art sec ch chap op cit ibid resp".split()
)
_PLAIN = max(map(len, _ABBREVIATIONS)) + 1
"""So many letters are no abbreviation."""
_STARTERS = frozenset(
    "The He She It They We I You In On At A An But And This That These There When After As His".split()
)


def split_sentences(text: str, mode: str, wrapped: bool) -> list[str]:
    """Cuts a text into sentences that join to exactly that text: white space between two belongs to the second.

    Args:
        mode: `none` (one sentence), `line` (at every line), `split` (by punctuation and paragraph).
        wrapped: whether a paragraph ends at a blank line (lines are wrapped) or at every line.
    """
    if mode == "none":
        return [text] if text else []
    starts = [0, *(_line_starts(text) if mode == "line" else _sentence_starts(text, wrapped)), len(text)]
    sentences: list[str] = []
    begin = 0
    for lo, hi in zip(starts, starts[1:], strict=False):
        piece = text[lo:hi]
        if piece and not piece.isspace():
            sentences.append(text[begin:hi])
            begin = hi
    if begin < len(text):
        sentences = [*sentences[:-1], "".join(sentences[-1:]) + text[begin:]]
    return sentences


def _line_starts(text: str) -> list[int]:
    return [match.start() for match in re.finditer("\n", text)]


def _sentence_starts(text: str, wrapped: bool) -> list[int]:
    """Positions after the closing mark of each sentence but the last."""
    starts, begin = [], 0
    for match in _ENDS[wrapped].finditer(text):
        if match.lastindex == 3:
            position = match.start()
        elif match.lastindex == 1 or _soft_end(text, begin, match):
            position = match.end()
        else:
            continue
        starts.append(position)
        begin = position
    return starts


def _soft_end(text: str, begin: int, match: re.Match[str]) -> bool:
    """Whether `.`, `!`, `?` or `…` before white space ends the sentence that begins at `begin`."""
    word = match[2]
    if word[:1].islower():
        return False
    marks = match[0]
    if marks[0] not in ".．" or marks[1:2] in (".", "!", "?"):
        return True
    end = match.start()
    before = text[max(begin, end - 24) : end]
    if before[-_PLAIN:].isalpha() and len(before) >= _PLAIN and "." not in before:
        return True
    last = _BEFORE.split(before)[-1]
    if last.lower() in _ABBREVIATIONS and last != "I":
        return False
    if len(last) == 1 and last.isupper() and last != "I":
        return False  # an initial
    if "." in last:
        return word in _STARTERS  # U.S., a.m., Ph.D.
    return not (last.isdigit() and text[begin:end].strip() == last)  # "1." of a list
