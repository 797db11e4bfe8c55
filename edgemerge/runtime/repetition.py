"""An answer that says the same again and again: noticed, so that it can end."""

from __future__ import annotations

import numpy as np

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
        self._tokens = np.empty(LEAST_TIMES * MAX_PERIOD, np.int32)  # the last of the answer
        self._n = 0  # of them that are filled
        self._n_unseen = 0

    def push(self, token: int) -> bool:
        """Add a token; tell whether the answer has begun to repeat itself."""
        if self._n == len(self._tokens):
            self._tokens[:-1] = self._tokens[1:]
            self._n -= 1
        self._tokens[self._n] = token
        self._n += 1
        self._n_unseen += 1
        if self._n < LEAST_TOKENS or self._n_unseen < STRIDE:
            return False
        self._n_unseen = 0
        said = self._tokens[: self._n]
        return any(self._is_period(said, period) for period in range(1, MAX_PERIOD + 1))

    def _is_period(self, said: np.ndarray, period: int) -> bool:
        n = max(LEAST_TOKENS, LEAST_TIMES * period)
        if n > len(said):
            return False
        end = said[-n:]
        return bool(np.array_equal(end[period:], end[:-period]))
