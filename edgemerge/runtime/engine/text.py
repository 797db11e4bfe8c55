"""Text of an answer, from the bytes of its tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

__all__ = ["AnswerText"]


class AnswerText:
    """Whole characters, and nothing that may become a stop text.

    Parameters
    ----------
    stops : sequence of str
        Texts that end the answer; empty ones do not count.

    Attributes
    ----------
    is_stopped : bool
        Whether a stop text came.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.is_stopped = False
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=1) - 1
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._kept = ""

    def push(self, raw: bytes) -> str:
        """Add a token's bytes; give what can be said now."""
        text = self._kept + self._characters.decode(raw)
        if not self._stops:
            return text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        self.is_stopped = bool(found)
        n_said = min(found) if found else len(text) - self._n_unsure(text)
        self._kept = text[n_said:]
        return text[:n_said]

    def finish(self) -> str:
        """Give what was kept back; a character that was cut off becomes U+FFFD."""
        return self._kept + self._characters.decode(b"", final=True)

    def _n_unsure(self, text: str) -> int:
        """Length of the longest end of a text that begins a stop text."""
        lengths = range(min(self._longest, len(text)), 0, -1)
        ends = (n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops))
        return next(ends, 0)
