"""One request on its way through the model: what stops it, and what is counted."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from edgemerge.runtime.serve.errors import SERVER, Refusal, stopping

__all__ = ["Run", "current_run"]


@dataclass(slots=True)
class Run:
    """One request that uses a model.

    The event loop stops it, a worker thread computes it: each field has one writer.

    Attributes
    ----------
    model : str
        Name of the model.
    time_limit : float
        Seconds from its turn to its end.
    with_usage : bool
        Whether the client wants the tokens counted at the end of a stream.
    prompt_tokens, generated_tokens : int
        Counted so far.
    failure : Refusal or None
        What a stream failed with before its first word.
    """

    model: str
    time_limit: float
    with_usage: bool = False
    prompt_tokens: int = 0
    generated_tokens: int = 0
    failure: Refusal | None = None
    _arrived: float = field(default_factory=time.monotonic)
    _began: float = 0.0
    _first: float = 0.0  # when the first and the last token came
    _last: float = 0.0
    _stop: Refusal | None = None

    def start(self) -> None:
        """Begin the turn: its time runs from now."""
        self._began = time.monotonic()

    def stop(self, why: Refusal) -> None:
        """Let the next `check` raise."""
        self._stop = self._stop or why

    def leave(self) -> None:
        """Stop: nobody waits for the answer any more."""
        self.stop(Refusal(499, "the client has left"))

    def shut_down(self) -> None:
        """Stop: the server has to end."""
        self.stop(stopping())

    def check(self) -> None:
        """Raise where the request is to stop; called before every token and batch of the prompt.

        Raises
        ------
        Refusal
            Why.
        """
        if self._stop is not None:
            raise self._stop
        if self.turn_seconds > self.time_limit:
            raise Refusal(
                504,
                f"the answer took longer than {self.time_limit:g} s: ask for fewer tokens",
                kind=SERVER,
                code="time_limit",
            )

    def note_token(self) -> None:
        """Count a generated token."""
        self._last = time.monotonic()
        self._first = self._first or self._last
        self.generated_tokens += 1

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far, as OpenAI writes them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.prompt_tokens + self.generated_tokens,
        }

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

    @property
    def turn_seconds(self) -> float:
        """Time since its turn began."""
        return time.monotonic() - self._began


# Set by the gate, read by the model: worker threads get a copy of the request's context.
current_run: ContextVar[Run] = ContextVar("current_run")
