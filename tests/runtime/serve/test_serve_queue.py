from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from edgemerge.runtime.serve.active_request import Run
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.queue import Queue


def in_loop(scenario: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(10):
            await scenario()

    asyncio.run(limited())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_turns_come_in_order() -> None:
    async def scenario() -> None:
        queue, order = Queue(3, 60.0), []

        async def take(name: str) -> None:
            await queue.enter()
            order.append(name)

        await take("a")
        tasks = [asyncio.create_task(take(name)) for name in "bcd"]
        await settle()
        assert (order, queue.running, queue.waiting) == (["a"], 1, 3)
        for n in range(4):
            assert len(order) == n + 1
            queue.leave(0.1)
            await settle()
        await asyncio.gather(*tasks)
        assert (order, queue.running, queue.waiting) == (list("abcd"), 0, 0)

    in_loop(scenario)


def test_a_full_line_is_refused_and_the_hint_grows() -> None:
    async def scenario() -> None:
        queue = Queue(1, 60.0)
        await queue.enter()
        waiting = asyncio.create_task(queue.enter())
        await settle()
        with pytest.raises(Refusal) as caught:
            await queue.enter()
        assert (caught.value.status, caught.value.retry_after) == (429, 1)
        for _ in range(20):
            queue.leave(30.0)
            await waiting
            waiting = asyncio.create_task(queue.enter())
            await settle()
        with pytest.raises(Refusal) as caught:
            await queue.enter()
        assert 25 <= (caught.value.retry_after or 0) <= 31
        queue.leave(1.0)
        await waiting

    in_loop(scenario)


def test_a_long_wait_ends() -> None:
    async def scenario() -> None:
        queue = Queue(2, 0.05)
        await queue.enter()
        with pytest.raises(Refusal, match=r"busy for 0\.05 s"):
            await queue.enter()
        assert queue.waiting == 0
        queue.leave(1.0)
        await queue.enter()

    in_loop(scenario)


@pytest.mark.parametrize("turn_came", [False, True])
def test_who_gives_up_takes_no_turn(turn_came: bool) -> None:
    async def scenario() -> None:
        queue = Queue(2, 60.0)
        await queue.enter()
        first, second = (asyncio.create_task(queue.enter()) for _ in range(2))
        await settle()
        if turn_came:  # in the same moment
            queue.leave(1.0)
        first.cancel()
        await settle()
        if not turn_came:
            queue.leave(1.0)
        await second
        assert (queue.running, queue.waiting) == (1, 0)

    in_loop(scenario)


def test_a_closed_queue_sends_all_away_but_who_runs() -> None:
    async def scenario() -> None:
        queue = Queue(2, 60.0)
        await queue.enter()
        waiting = asyncio.create_task(queue.enter())
        await settle()
        queue.close()
        for refused in (waiting, asyncio.create_task(queue.enter())):
            with pytest.raises(Refusal, match="stopping") as caught:
                await refused
            assert caught.value.status == 503
        assert queue.running == 1
        queue.leave(1.0)
        assert queue.running == 0

    in_loop(scenario)


def test_a_run_measures_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([101.0, 103.0, 104.0, 105.0, 105.5, 108.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    run = Run("m", 6.0, _arrived=100.0)
    assert run.tokens_per_second is run.time_to_first_token is None
    run.start()  # at 101
    for _ in range(3):
        run.note_token()  # at 103, 104, 105
    assert run.time_to_first_token == 3.0
    assert run.tokens_per_second == 1.0
    run.check()  # at 105.5
    with pytest.raises(Refusal, match="longer than 6 s"):
        run.check()  # at 108
    run.leave()
    run.shut_down()
    with pytest.raises(Refusal, match="has left"):
        run.check()
