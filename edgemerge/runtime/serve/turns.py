"""A turn at a model, from the place in the queue to the last token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from edgemerge.runtime.engine.messages import Begun, Ended, Generation, Piece, PromptScored
from edgemerge.runtime.serve.active_request import Run, current_run
from edgemerge.runtime.serve.errors import SERVER, Refusal
from edgemerge.runtime.serve.loaded import Loaded
from edgemerge.runtime.serve.options import Limits
from edgemerge.runtime.serve.queue import Queue
from edgemerge.runtime.serve.requests import Body
from edgemerge.runtime.serve.status import Status
from edgemerge.runtime.serve.store import ModelStore

__all__ = ["Event", "Turn", "Turns"]

Event = Begun | PromptScored | Piece | Ended


@dataclass(frozen=True, slots=True)
class Turn:
    """A request that has a place at a model."""

    loaded: Loaded
    run: Run
    queue: Queue

    async def answer(self, wanted: Sequence[Generation]) -> AsyncGenerator[tuple[int, Event], None]:
        """Compute one answer or several, at a time as far as places are free.

        Yields
        ------
        (int, Event)
            Which of them, and what came of it.

        Raises
        ------
        EngineFailure
            The first that fails ends all.
        """
        if len(wanted) == 1:
            async with aclosing(self._answer(wanted[0])) as events:
                async for event in events:
                    yield 0, event
            return
        name = self.loaded.file.name
        n_spare = 0
        while n_spare + 1 < len(wanted) and self.queue.enter_now(name):
            n_spare += 1
        # small, so that a client that does not read stops what computes for it
        arrived: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(2 * n_spare + 2)
        numbers = iter(range(len(wanted)))

        async def work(*, is_spare: bool) -> None:
            for i in numbers:
                try:
                    async with aclosing(self._answer(wanted[i])) as events:
                        async for event in events:
                            await arrived.put((i, event))
                except Exception as error:
                    await arrived.put((i, error))
                    return
                if is_spare and self.queue.waiting:  # others have none at all
                    return

        tasks = [asyncio.create_task(work(is_spare=False))]
        for _ in range(n_spare):
            tasks.append(asyncio.create_task(work(is_spare=True)))
            tasks[-1].add_done_callback(lambda _: self.queue.leave(name))
        try:
            left = len(wanted)
            while left:
                i, came = await arrived.get()
                if isinstance(came, Exception):
                    raise came
                left -= isinstance(came, Ended)
                yield i, came
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, wanted: Generation) -> AsyncGenerator[Event, None]:
        async with aclosing(self.loaded.process.generate(wanted)) as events:
            async for event in events:
                if isinstance(event, Begun):
                    self.run.prompt_tokens += event.n_prompt
                elif isinstance(event, Piece):
                    self.run.note_tokens(event.n_tokens)
                yield event


class Turns:
    """Gives turns.

    Parameters
    ----------
    models, queue, status
        Of the server.
    limits : Limits
        Bounds of one request.
    """

    def __init__(self, models: ModelStore, queue: Queue, status: Status, limits: Limits) -> None:
        self.models = models
        self.status = status
        self.limits = limits
        self._queue = queue

    @asynccontextmanager
    async def turn(self, body: Body) -> AsyncIterator[Turn]:
        """Wait for a place and a model, and give both back at the end.

        Raises
        ------
        Refusal
            404: there is no such model; as of `Queue.enter`, `ModelStore.open`.
        """
        run = current_run.get()
        name = run.model = self.models.resolve(body.model).name
        run.said = body.said()
        await self._queue.enter(name)
        loop = asyncio.get_running_loop()
        began = loop.time()
        limit = self.limits.request_seconds
        timer = loop.call_later(limit, run.stop, _too_long(limit))
        run.has_turn = True
        try:
            loaded = await self.models.open(name)
            run.sha256 = loaded.sha256
            try:
                yield Turn(loaded, run, self._queue)
            finally:
                self.models.release(loaded)
        finally:
            timer.cancel()
            self.status.metrics.note_run(run)
            self._queue.leave(name, loop.time() - began)


def _too_long(seconds: float) -> Refusal:
    return Refusal(
        504,
        f"the answer took longer than {seconds:g} s: ask for fewer tokens",
        kind=SERVER,
        code="time_limit",
    )
