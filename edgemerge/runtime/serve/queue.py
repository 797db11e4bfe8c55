"""Requests take turns: as many as a model has sequences use it, a few wait, the rest hear that it is busy."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from edgemerge.runtime.serve.errors import BUSY, Refusal, stopping

__all__ = ["Places", "Queue", "Room"]

_LONGEST_RETRY = 60  # seconds that a client is told to wait at most


class Room(Enum):
    """Whether a model has a place for one more request."""

    FREE = auto()
    FULL = auto()  # of its own requests; those for other models may go before
    SHUT = auto()  # other models have to end first, so that nobody may go before


class Places(Protocol):
    """What the queue asks of the models."""

    def room_for(self, model: str) -> Room:
        """Whether one more request may begin."""

    def take(self, model: str) -> None:
        """Count one more request."""

    def give_back(self, model: str) -> None:
        """Count one less."""


@dataclass(slots=True)
class _Turn:
    model: str
    came: asyncio.Future[None]


class Queue:
    """A bounded line in front of the models; all of it runs in one event loop.

    Parameters
    ----------
    places : Places
        Where requests run.
    limit : int
        Requests that may wait.
    timeout : float
        Seconds that one may wait.
    """

    def __init__(self, places: Places, limit: int, timeout: float) -> None:
        self.limit = limit
        self.timeout = timeout
        self.running = 0
        self.is_closed = False
        self._places = places
        self._line: deque[_Turn] = deque()
        self._mean_seconds = 1.0  # of a turn, recent ones counting more

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._line)

    async def enter(self, model: str) -> None:
        """Wait for a place; `leave` must follow.

        Raises
        ------
        Refusal
            429 where the line is full, 503 after too long a wait or when the server stops.
        """
        if self.is_closed:
            raise stopping()
        turn = _Turn(model, asyncio.get_running_loop().create_future())
        self._line.append(turn)
        self.advance()
        if turn.came.done():
            return
        if self.waiting > self.limit:
            self._line.remove(turn)
            why = f"the server is busy: {self.waiting} requests are waiting"
            raise self._busy(429, why, "queue_full")
        try:
            async with asyncio.timeout(self.timeout):
                await turn.came
        except TimeoutError:
            self._give_up(turn)
            why = f"the server was busy for {self.timeout:g} s"
            raise self._busy(503, why, "queue_timeout") from None
        except BaseException:
            self._give_up(turn)
            raise

    def enter_now(self, model: str) -> bool:
        """Take a place more for a request that has one, if nobody waits for it."""
        if self._line or self.is_closed or self._places.room_for(model) is not Room.FREE:
            return False
        self._begin(model)
        return True

    def leave(self, model: str, seconds: float | None = None) -> None:
        """Give a place back, after a turn of so many seconds, and let others begin."""
        if seconds is not None:
            self._mean_seconds += 0.3 * (seconds - self._mean_seconds)
        self.running -= 1
        self._places.give_back(model)
        self.advance()

    def close(self) -> None:
        """Send all who wait away; who has a turn keeps it."""
        self.is_closed = True
        while self._line:
            turn = self._line.popleft()
            if not turn.came.done():
                turn.came.set_exception(stopping())

    def advance(self) -> None:
        """Let all begin who can; called whenever there may be room."""
        for turn in tuple(self._line):
            room = self._places.room_for(turn.model)
            if room is Room.SHUT:
                return
            if room is Room.FREE:
                self._line.remove(turn)
                if not turn.came.done():
                    self._begin(turn.model)
                    turn.came.set_result(None)

    def _begin(self, model: str) -> None:
        self.running += 1
        self._places.take(model)

    def _give_up(self, turn: _Turn) -> None:
        if turn in self._line:
            self._line.remove(turn)
            self.advance()  # who could not go before may now
        elif turn.came.done() and not turn.came.cancelled() and turn.came.exception() is None:
            self.leave(turn.model)  # the turn came in the same moment

    def _busy(self, status: int, why: str, code: str) -> Refusal:
        """Refuse, and say in how many seconds the next request in the queue may begin."""
        wait = self._mean_seconds * (self.waiting + 1) / 2 / max(self.running, 1)
        seconds = max(1, min(_LONGEST_RETRY, math.ceil(wait)))
        return Refusal(status, why, kind=BUSY, code=code, retry_after=seconds)
