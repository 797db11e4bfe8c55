"""Models in processes of their own, for tests that are not written for an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from edgemerge.runtime.engine.messages import (
    Begun,
    Ended,
    Generation,
    Piece,
    PromptScored,
    Sampling,
    TokenScore,
)
from edgemerge.runtime.engine.options import EngineOptions
from edgemerge.runtime.engine.process import ModelProcess

__all__ = ["GREEDY", "Engine", "Told"]

T = TypeVar("T")

GREEDY = Sampling(temperature=0.0)


@dataclass
class Told:
    """What came of one generation."""

    begun: Begun | None = None
    prompt_scores: list[TokenScore] | None = None
    pieces: list[Piece] = field(default_factory=list)
    ended: Ended | None = None

    def take(self, event: object) -> None:
        """Add an event."""
        if isinstance(event, Begun):
            self.begun = event
        elif isinstance(event, PromptScored):
            self.prompt_scores = event.scores
        elif isinstance(event, Piece):
            self.pieces.append(event)
        elif isinstance(event, Ended):
            self.ended = event

    @property
    def text(self) -> str:
        """All that was said."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def n_reused(self) -> int:
        """Tokens of the prompt that were computed before."""
        assert self.begun is not None
        return self.begun.n_reused

    @property
    def reason(self) -> str:
        """Why it ended."""
        assert self.ended is not None
        return self.ended.reason


class Engine:
    """A model's process and an event loop for it; use it in a `with` statement."""

    def __init__(self, path: Path, **options: Any) -> None:
        self._runner = asyncio.Runner()
        options.setdefault("n_threads", 1)
        self.process = ModelProcess(EngineOptions(path, **options))

    def __enter__(self) -> Self:
        self.facts = self.run(self.process.start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.run(self.process.close())
        self._runner.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something in the loop."""
        return self._runner.run(work)

    def ask(self, prompt: Any, n: int = 8, sampling: Sampling = GREEDY, **wanted: Any) -> Told:
        """Have one answer."""
        return self.ask_all([Generation(prompt, n, sampling, **wanted)])[0]

    def ask_all(self, wanted: Sequence[Generation]) -> list[Told]:
        """Have several answers at a time."""

        async def gather() -> list[Told]:
            return await asyncio.gather(*(collect(self.process, one) for one in wanted))

        return self.run(gather())


async def collect(process: ModelProcess, wanted: Generation) -> Told:
    """Take all events of one generation."""
    told = Told()
    async for event in process.generate(wanted):
        told.take(event)
    return told
