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
_PARAGRAPH = {True: r"\n[ \t]*(?=\n)", False: r"\n"}
_ENDS = {  # possessive, and never tried inside a run of marks: linear in the worst text
    wrapped: re.compile(
        rf"([{_HARD}][{_HARD}{_SOFT}]*+[{_CLOSERS}]*+)|((?<![{_SOFT}])[{_SOFT}]++[{_CLOSERS}]*+)(?=\s)|({paragraph})"
    )
    for wrapped, paragraph in _PARAGRAPH.items()
}
_NEXT = re.compile(rf"\s*([{re.escape(_OPENERS)}]*)(\w*)")
_BEFORE = re.compile(r"[\s(\[{\"'“‘—–-]")

_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof rev hon st sr jr gen col capt lt sgt cmdr gov sen rep pres mt ft no nos vol vols fig figs pp p "
    "ed eds al vs cf ca approx dept univ inc ltd co corp bros est jan feb mar apr jun jul aug sep sept oct nov dec mon "
    "tue wed thu fri sat sun e.g i.e viz art sec ch chap op cit ibid resp".split()
)
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
    blank = ""
    for lo, hi in zip(starts, starts[1:], strict=False):
        piece = blank + text[lo:hi]
        blank = ""
        if not piece or piece.isspace():
            blank = piece
        else:
            sentences.append(piece)
    if blank and sentences:
        sentences[-1] += blank
    elif blank:
        sentences = [blank]
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
    following = _NEXT.match(text, match.end())
    assert following is not None
    word = following[2]
    if word[:1].islower():
        return False
    if match[2][0] not in ".．" or match[2][1:2] in (".", "!", "?"):
        return True
    last = _BEFORE.split(text[max(begin, match.start() - 24) : match.start()])[-1]
    if last.lower() in _ABBREVIATIONS and last != "I":
        return False
    if len(last) == 1 and last.isupper() and last != "I":
        return False  # an initial
    if "." in last:
        return word in _STARTERS  # U.S., a.m., Ph.D.
    return not (last.isdigit() and text[begin : match.start()].strip() == last)  # "1." of a list
