"""Several answers to one request: at a time as far as places are free, and not at the cost of others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from edgemerge.runtime.engine.messages import (
    Begun,
    Ended,
    Generation,
    Piece,
    PromptScored,
    TokenScore,
)
from edgemerge.runtime.engine.process import EngineFailure
from edgemerge.runtime.serve import events
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.queue import Queue
from edgemerge.runtime.serve.turns import Turn
from tests.support.fake_process import FakeProcess, make_turn

N_PLACES = 3


class Writer(FakeProcess):
    """Writes a word for each prompt, and notes how many are written at a time."""

    running = most = 0

    async def generate(self, wanted: Generation) -> AsyncGenerator[Any, None]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            yield Begun(1, 0)
            await asyncio.sleep(0.01)
            if wanted.prompt == "bad":
                raise EngineFailure("no such word", 400)
            yield Piece(str(wanted.prompt), 1)
            yield Ended("stop", 1)
        finally:
            self.running -= 1


async def start() -> tuple[Turn, Queue, Writer]:
    writer = Writer("a")
    return *(await make_turn(writer, N_PLACES)), writer


async def ask(turn: Turn, *prompts: str) -> dict[int, str]:
    said: dict[int, str] = {}
    async for i, event in turn.answer([Generation(prompt, 1) for prompt in prompts]):
        if isinstance(event, Piece):
            said[i] = event.text
    return said


def test_free_places_are_used_and_given_back() -> None:
    async def scenario() -> None:
        turn, queue, writer = await start()
        assert await ask(turn, *"abcdefgh") == dict(enumerate("abcdefgh"))
        await asyncio.sleep(0)
        assert (writer.most, queue.running) == (N_PLACES, 1)
        assert turn.run.generated_tokens == 8

    asyncio.run(scenario())


def test_who_waits_gets_a_place_before_all_is_answered() -> None:
    async def scenario() -> None:
        turn, queue, writer = await start()
        asking = asyncio.create_task(ask(turn, *(["x"] * 50)))
        await asyncio.sleep(0.005)
        assert queue.running == N_PLACES
        await asyncio.wait_for(queue.enter("a"), 0.2)
        assert not asking.done()
        queue.leave("a")
        assert len(await asking) == 50
        await asyncio.sleep(0)
        assert (queue.running, writer.running) == (1, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("prompts", [("bad",), ("a", "bad", "c", "d")])
def test_the_first_failure_ends_all(prompts: tuple[str, ...]) -> None:
    async def scenario() -> None:
        turn, queue, writer = await start()
        with pytest.raises(EngineFailure, match="no such word"):
            await ask(turn, *prompts)
        await asyncio.sleep(0)
        assert (queue.running, writer.running) == (1, 0)

    asyncio.run(scenario())


def test_whoever_leaves_ends_all() -> None:
    async def scenario() -> None:
        turn, queue, writer = await start()
        asking = asyncio.create_task(ask(turn, *(["x"] * 50)))
        await asyncio.sleep(0.02)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0)
        assert (queue.running, writer.running) == (1, 0)

    asyncio.run(scenario())


class Scorer(FakeProcess):
    """Gives twelve log-probabilities for each prompt."""

    async def generate(self, wanted: Generation) -> AsyncGenerator[Any, None]:
        yield Begun(3, 0)
        yield PromptScored([TokenScore(7, b"a", -1.0, ((7, b"a", -1.0),) * 2)] * 3)
        yield Piece("a", 1, [TokenScore(7, b"a", -1.0, ((7, b"a", -1.0),) * 2)])
        yield Ended("stop", 1)


@pytest.mark.parametrize("n", [1, 4])
def test_log_probabilities_that_are_kept_have_a_bound(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: some hundred prompts with echo and 20 alternatives took gigabytes beside --memory."""
    monkeypatch.setattr(events, "_MOST_SCORES", 12 * n)

    async def scenario() -> None:
        for n_asked in (n, n + 1):
            turn, _ = await make_turn(Scorer("a"), N_PLACES)
            wanted = [Generation("a", 1, n_alternatives=2, scores_prompt=True)] * n_asked
            if n_asked > n:
                with pytest.raises(Refusal, match=f"at most {12 * n} of them") as caught:
                    await events.answer_all(turn, wanted)
                assert caught.value.status == 400
            else:
                assert len(await events.answer_all(turn, wanted)) == n

    asyncio.run(scenario())
