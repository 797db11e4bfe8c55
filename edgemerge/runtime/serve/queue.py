"""Requests take turns: one uses the model, a few wait, the rest hear at once that it is busy."""

from __future__ import annotations

import asyncio
import math
from collections import deque

from edgemerge.runtime.serve.errors import BUSY, Refusal, stopping

__all__ = ["Queue"]

_LONGEST_RETRY = 60  # seconds that a client is told to wait at most


class Queue:
    """A bounded line in front of the model; all of it runs in one event loop.

    Parameters
    ----------
    limit : int
        Requests that may wait.
    timeout : float
        Seconds that one may wait.
    """

    def __init__(self, limit: int, timeout: float) -> None:
        self.limit = limit
        self.timeout = timeout
        self.running = 0  # 0 or 1: llama.cpp's context computes one sequence
        self.is_closed = False
        self._line: deque[asyncio.Future[None]] = deque()
        self._mean_seconds = 1.0  # of a turn, recent ones counting more

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._line)

    async def enter(self) -> None:
        """Wait for the turn; `leave` must follow.

        Raises
        ------
        Refusal
            429 where the line is full, 503 after too long a wait or when the server stops.
        """
        if self.is_closed:
            raise stopping()
        if not self.running:
            self.running = 1
            return
        if self.waiting >= self.limit:
            raise Refusal(
                429,
                f"the server is busy: {self.waiting} requests are waiting",
                kind=BUSY,
                code="queue_full",
                retry_after=self._retry_after(),
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            async with asyncio.timeout(self.timeout):
                await turn
        except TimeoutError:
            self._give_up(turn)
            raise Refusal(
                503,
                f"the server was busy for {self.timeout:g} s",
                kind=BUSY,
                code="queue_timeout",
                retry_after=self._retry_after(),
            ) from None
        except BaseException:
            self._give_up(turn)
            raise

    def leave(self, seconds: float) -> None:
        """End a turn that took so long, and let the next begin."""
        self._mean_seconds += 0.3 * (seconds - self._mean_seconds)
        self._next()

    def close(self) -> None:
        """Send all who wait away; who has the turn keeps it."""
        self.is_closed = True
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_exception(stopping())

    def _next(self) -> None:
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)  # `running` stays 1: the turn is handed over
                return
        self.running = 0

    def _give_up(self, turn: asyncio.Future[None]) -> None:
        if turn in self._line:
            self._line.remove(turn)
        elif turn.done() and not turn.cancelled() and turn.exception() is None:
            self._next()  # the turn came in the same moment

    def _retry_after(self) -> int:
        """Seconds until the next request in the queue may begin."""
        return max(1, min(_LONGEST_RETRY, math.ceil(self._mean_seconds * (self.waiting + 1) / 2)))
