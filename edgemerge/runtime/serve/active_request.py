"""One request on its way through the server: what stops it, and what is counted."""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from edgemerge.runtime.serve.errors import Refusal, stopping

__all__ = ["Run", "current_run"]


@dataclass(slots=True, eq=False)
class Run:
    """One request that uses a model; all of it happens in the event loop.

    Attributes
    ----------
    route : str
        Path of the request.
    model : str or None
        Name of the model, once it is known.
    sha256 : str or None
        Of the model's file when it was loaded, where requests are logged.
    said : dict
        What people wrote, by the request's names.
    prompt_tokens, generated_tokens : int
        Counted so far.
    task : asyncio.Task or None
        What answers it.
    refusal : Refusal or None
        Why it was stopped.
    """

    route: str
    model: str | None = None
    sha256: str | None = None
    said: dict[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    task: asyncio.Task[None] | None = None
    refusal: Refusal | None = None
    has_turn: bool = False
    came: datetime = field(default_factory=lambda: datetime.now(UTC))
    _arrived: float = field(default_factory=time.monotonic)
    _first: float = 0.0  # when the first and the last token came
    _last: float = 0.0

    def stop(self, why: Refusal) -> None:
        """End the answer; what computes it is cancelled, once."""
        if self.refusal is None and self.task is not None:
            self.refusal = why
            self.task.cancel()

    def leave(self) -> None:
        """Stop: nobody waits for the answer any more."""
        self.stop(Refusal(499, "the client has left"))

    def shut_down(self) -> None:
        """Stop: the server has to end."""
        self.stop(stopping())

    def note_tokens(self, count: int) -> None:
        """Count generated tokens that came at once."""
        self._last = time.monotonic()
        self._first = self._first or self._last
        self.generated_tokens += count

    @property
    def seconds(self) -> float:
        """Time since it came."""
        return time.monotonic() - self._arrived

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from the request's arrival to its first token, waiting included."""
        return self._first - self._arrived if self._first else None

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens per second, from the first token on; None before there are two."""
        if self.generated_tokens < 2 or self._last <= self._first:
            return None
        return (self.generated_tokens - 1) / (self._last - self._first)


# Set by the gate, read by what gives turns: the task of the request gets a copy of its context.
current_run: ContextVar[Run] = ContextVar("current_run")
