"""The text of tokens as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"
"""What decoding puts for bytes that are no whole UTF-8 character (yet)."""


class TextStream:
    """Turns the tokens of one row into text that can be shown at once.

    Shown text is never taken back: the bytes of an unfinished character wait for the rest of it, and what may be the
    beginning of a stop string waits until it is one or is not.

    Attributes:
        text: the continuation so far, without the stop string that ended it.
        stop: that stop string; None while none has come.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stops: Sequence[str] = ()):
        """
        Args:
            decode: ids -> text, of a tokenizer.
            prompt: ids before the continuation: how a piece is spelt may depend on what precedes it.
            stops: strings that end the text; none is empty.
        """
        self.text, self.stop = "", None
        self._decode, self._stops = decode, tuple(stops)
        self._ids, self._begin, self._shown = list(prompt), len(decode(prompt)), 0

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` add to what was shown."""
        if self.stop is not None:
            return ""
        self._ids += tokens
        self.text = self._decode(self._ids)[self._begin :]
        found = [(at, -len(stop), stop) for stop in self._stops if (at := self.text.find(stop)) >= 0]
        if found:
            at, _, self.stop = min(found)
            self.text = self.text[:at]
        return self._show(len(self.text) if found else self._certain())

    def finish(self) -> str:
        """The text that was held back, when no more tokens come."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        fresh = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return fresh

    def _certain(self) -> int:
        """How much of the text no later token can change."""
        end = len(self.text.rstrip(_INCOMPLETE))
        for stop in self._stops:
            for held in range(min(len(stop) - 1, end), 0, -1):
                if self.text.endswith(stop[:held], 0, end):
                    end -= held
                    break
        return end
