"""Server-sent events, and what all answers that are written by a model have in common."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from edgemerge.runtime.engine.messages import (
    Begun,
    Ended,
    Generation,
    Piece,
    PromptScored,
    TokenScore,
)
from edgemerge.runtime.serve.errors import Refusal, explain
from edgemerge.runtime.serve.turns import Event, Turn

__all__ = ["Answer", "Documents", "EventStream", "answer_all", "head", "stream", "usage"]

Documents = AsyncGenerator[dict[str, Any] | str, None]

_MOST_SCORES = 1 << 19  # of an answer in one piece, which takes some 200 bytes for each


@dataclass(slots=True)
class Answer:
    """What came of one answer so far."""

    n_prompt: int = 0
    n_reused: int = 0  # of the prompt, computed for another answer before
    n_generated: int = 0
    text: str = ""
    prompt_scores: list[TokenScore] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    end: Ended | None = None

    def add(self, event: Event) -> None:
        """Add an event of a turn."""
        match event:
            case Begun():
                self.n_prompt, self.n_reused = event.n_prompt, event.n_reused
            case PromptScored():
                self.prompt_scores = event.scores
            case Piece():
                self.text += event.text
                self.scores += event.scores
            case Ended():
                self.end = event
                self.n_generated = event.n_generated

    @property
    def reason(self) -> str:
        """OpenAI's `finish_reason`; an answer that repeated itself was cut off too."""
        return "stop" if self.end is not None and self.end.reason == "stop" else "length"


async def answer_all(turn: Turn, wanted: Sequence[Generation]) -> list[Answer]:
    """Compute answers to their ends.

    Raises
    ------
    Refusal
        400: they have more log-probabilities than can be kept.
    """
    answers = [Answer() for _ in wanted]
    n_scores = 0
    async with aclosing(turn.answer(wanted)) as events:
        async for i, event in events:
            answers[i].add(event)
            if isinstance(event, PromptScored | Piece):
                n_scores += sum(1 + len(score.alternatives) for score in event.scores)
            if n_scores > _MOST_SCORES:
                raise Refusal(
                    400,
                    f"logprobs: an answer has at most {_MOST_SCORES} of them; ask for fewer prompts, "
                    "tokens or alternatives at a time",
                )
    return answers


def head(kind: str, prefix: str, turn: Turn) -> dict[str, Any]:
    """Fields that each answer, and each piece of a stream, begins with."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": turn.loaded.file.name,
        "system_fingerprint": turn.loaded.facts.fingerprint,
    }


def usage(answers: list[Answer], turn: Turn, n: int = 1) -> dict[str, Any]:
    """Tokens as OpenAI counts them; n answers in a row have one prompt."""
    n_prompt = sum(answer.n_prompt for answer in answers[::n])
    n_generated = sum(answer.n_generated for answer in answers)
    turn.run.prompt_tokens, turn.run.generated_tokens = n_prompt, n_generated
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
        "prompt_tokens_details": {"cached_tokens": sum(a.n_reused for a in answers[::n])},
    }


class EventStream(Response):
    """Answers with events as they come; a failure becomes the last of them."""

    media_type = "text/event-stream"

    def __init__(self, first: str, events: AsyncGenerator[str, None]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._first = first
        self._events = events
        self.raw_headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Send all events."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        event: str | None = self._first
        async with aclosing(self._events):
            while event is not None:
                await send(_body(event, more=True))
                event = await self._next()
        await send(_body("", more=False))

    async def _next(self) -> str | None:
        try:
            return await anext(self._events, None)
        except Exception as error:
            return f"data: {explain(error).event()}\n\n"


async def stream(events: Documents) -> EventStream:
    """Begin a stream; what fails before its first event is raised, so that it gets a status of its own.

    Parameters
    ----------
    events : generator of dict or str
        Documents, or text as it is. One with a `type` is named by it, as OpenAI's Responses are.
    """
    written = _write(events)
    return EventStream(await anext(written), written)


async def _write(events: Documents) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, str):
                yield f"data: {event}\n\n"
                continue
            name = f"event: {event['type']}\n" if "type" in event else ""
            yield f"{name}data: {json.dumps(event)}\n\n"


def _body(text: str, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}
