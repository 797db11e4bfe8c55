"""An answer that says the same again and again: noticed, so that it can end."""

from __future__ import annotations

__all__ = ["LoopWatch"]

MAX_PERIOD = 160  # tokens of what is repeated; a paragraph
LEAST_TIMES = 3  # that it is said in full, one after the other
LEAST_TOKENS = 64  # that all of these have; a short refrain or a ruled line is no loop
STRIDE = 8  # tokens between two looks


class LoopWatch:
    """Looks at the tokens of one answer.

    Six numbers: after 7 1 2 1 2 1 2 the last six are `1 2` three times. They would be a loop if
    `LEAST_TOKENS` were 6 instead of 64.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []  # the last of the answer
        self._n_unseen = 0

    def push(self, token: int) -> bool:
        """Add a token; tell whether the answer has begun to repeat itself."""
        self._tokens.append(token)
        self._n_unseen += 1
        if len(self._tokens) < LEAST_TOKENS or self._n_unseen < STRIDE:
            return False
        self._n_unseen = 0
        said = self._tokens = self._tokens[-LEAST_TIMES * MAX_PERIOD :]
        before = said[-MAX_PERIOD - 1 : -1]
        periods = [i for i, other in enumerate(reversed(before), start=1) if other == token]
        return any(_is_period(said, period) for period in periods)


def _is_period(said: list[int], period: int) -> bool:
    n = max(LEAST_TOKENS, LEAST_TIMES * period)
    if n > len(said):
        return False
    end = said[-n:]
    return end[period:] == end[:-period]
