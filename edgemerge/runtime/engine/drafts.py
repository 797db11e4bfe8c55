"""Guesses at what comes next, from what came before: prompt lookup decoding (apoorvumang, 2023).

An answer that quotes its prompt, as a corrected text does, repeats long runs of tokens. Where the last tokens
were there before, those that followed are a guess. One batch computes all of them, and the answer is the
same as without: a token counts only if it is the one that is drawn.
"""

from __future__ import annotations

__all__ = ["MOST", "Drafts"]

MOST = 8  # tokens: more of them cost as much each as they save
_FIRST = 1
_KEY = 6  # tokens that have to be the same: with 4, one answer in three had a guess that was there by chance
_PAUSE = 16  # tokens without guesses after a wrong one; each wrong one doubles it


class Drafts:
    """Guesses for one answer."""

    def __init__(self) -> None:
        self._places: dict[
            tuple[int, ...], int
        ] = {}  # where what followed these tokens last begins
        self._n_seen = _KEY
        self._n = _FIRST
        self._pause = _PAUSE
        self._next = 0  # length from which on it guesses again

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """Guess the tokens that follow.

        Parameters
        ----------
        tokens : list of int
            Prompt and answer so far; those of the call before, and more.
        most : int
            Guesses wanted at most.
        """
        for end in range(self._n_seen, len(tokens)):
            self._places[tuple(tokens[end - _KEY : end])] = end
        self._n_seen = max(self._n_seen, len(tokens))
        place = self._places.get(tuple(tokens[-_KEY:]))
        if place is None or len(tokens) < self._next:
            return []
        period = len(tokens) - place  # what repeats itself at the end goes on so
        return [tokens[place + i % period] for i in range(min(self._n, most))]

    def note(self, n_guessed: int, n_right: int, n_tokens: int) -> None:
        """Learn from how many of the guesses were right; there are now so many tokens."""
        if n_right == n_guessed:
            self._n = min(2 * self._n, MOST)
            self._pause = _PAUSE
            return
        self._n = _FIRST
        if not n_right:
            self._next = n_tokens + self._pause
            self._pause *= 2
