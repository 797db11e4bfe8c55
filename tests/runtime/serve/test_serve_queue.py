from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from edgemerge.runtime.serve.active_request import Run
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.queue import Queue, Room


class Rooms:
    """Two places for "a" and one for "b"; "c" is alone or not at all."""

    def __init__(self) -> None:
        self.running: list[str] = []

    def room_for(self, model: str) -> Room:
        if model == "c":
            return Room.SHUT if self.running else Room.FREE
        count = 9 if "c" in self.running else self.running.count(model)
        return Room.FREE if count < {"a": 2, "b": 1}[model] else Room.FULL

    def take(self, model: str) -> None:
        self.running.append(model)

    def give_back(self, model: str) -> None:
        self.running.remove(model)


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
        queue, order = Queue(Rooms(), 3, 60.0), []

        async def take(name: str) -> None:
            await queue.enter("b")
            order.append(name)

        await take("a")
        tasks = [asyncio.create_task(take(name)) for name in "bcd"]
        await settle()
        assert (order, queue.running, queue.waiting) == (["a"], 1, 3)
        for n in range(4):
            assert len(order) == n + 1
            queue.leave("b", 0.1)
            await settle()
        await asyncio.gather(*tasks)
        assert (order, queue.running, queue.waiting) == (list("abcd"), 0, 0)

    in_loop(scenario)


def test_a_full_line_is_refused_and_the_hint_grows() -> None:
    async def scenario() -> None:
        queue = Queue(Rooms(), 1, 60.0)
        await queue.enter("b")
        waiting = asyncio.create_task(queue.enter("b"))
        await settle()
        with pytest.raises(Refusal) as caught:
            await queue.enter("b")
        assert (caught.value.status, caught.value.retry_after) == (429, 1)
        for _ in range(20):
            queue.leave("b", 30.0)
            await waiting
            waiting = asyncio.create_task(queue.enter("b"))
            await settle()
        with pytest.raises(Refusal) as caught:
            await queue.enter("b")
        assert 25 <= (caught.value.retry_after or 0) <= 31
        queue.leave("b", 1.0)
        await waiting

    in_loop(scenario)


def test_a_long_wait_ends() -> None:
    async def scenario() -> None:
        queue = Queue(Rooms(), 2, 0.05)
        await queue.enter("b")
        with pytest.raises(Refusal, match=r"busy for 0\.05 s"):
            await queue.enter("b")
        assert queue.waiting == 0
        queue.leave("b", 1.0)
        await queue.enter("b")

    in_loop(scenario)


@pytest.mark.parametrize("turn_came", [False, True])
def test_who_gives_up_takes_no_turn(turn_came: bool) -> None:
    async def scenario() -> None:
        queue = Queue(Rooms(), 2, 60.0)
        await queue.enter("b")
        first, second = (asyncio.create_task(queue.enter("b")) for _ in range(2))
        await settle()
        if turn_came:  # in the same moment
            queue.leave("b", 1.0)
        first.cancel()
        await settle()
        if not turn_came:
            queue.leave("b", 1.0)
        await second
        assert (queue.running, queue.waiting) == (1, 0)

    in_loop(scenario)


def test_a_closed_queue_sends_all_away_but_who_runs() -> None:
    async def scenario() -> None:
        queue = Queue(Rooms(), 2, 60.0)
        await queue.enter("b")
        waiting = asyncio.create_task(queue.enter("b"))
        await settle()
        queue.close()
        for refused in (waiting, asyncio.create_task(queue.enter("b"))):
            with pytest.raises(Refusal, match="stopping") as caught:
                await refused
            assert caught.value.status == 503
        assert queue.running == 1
        queue.leave("b", 1.0)
        assert queue.running == 0

    in_loop(scenario)


def test_models_do_not_wait_for_each_other_unless_one_needs_their_room() -> None:
    async def scenario() -> None:
        rooms = Rooms()
        queue, order = Queue(rooms, 9, 60.0), []

        async def take(name: str) -> None:
            await queue.enter(name)
            order.append(name)

        tasks = [asyncio.create_task(take(name)) for name in "aabba"]
        await settle()
        assert (order, queue.running, queue.waiting) == (list("aab"), 3, 2)
        tasks += [asyncio.create_task(take(name)) for name in "ca"]
        await settle()
        queue.leave("b", 1.0)
        await settle()
        assert order == list("aabb")  # came before "c"
        queue.leave("a", 1.0)
        queue.leave("a", 1.0)
        queue.leave("b", 1.0)
        await settle()
        assert order == list("aabba")
        assert not queue.enter_now("a")  # nobody goes before those who wait
        queue.leave("a", 1.0)
        await settle()
        assert (order[-1], rooms.running) == ("c", ["c"])
        queue.leave("c", 1.0)
        await asyncio.gather(*tasks)
        assert rooms.running == ["a"]
        assert queue.enter_now("a")
        assert not queue.enter_now("a")

    in_loop(scenario)


def test_who_leaves_the_line_lets_those_behind_go() -> None:
    async def scenario() -> None:
        queue = Queue(Rooms(), 9, 60.0)
        await queue.enter("a")
        first, second = (asyncio.create_task(queue.enter(name)) for name in "ca")
        await settle()
        assert queue.waiting == 2
        first.cancel()
        await settle()
        assert (queue.running, queue.waiting) == (2, 0)
        await second

    in_loop(scenario)


def test_a_run_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([103.0, 104.0, 105.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    run = Run("/v1/completions", _arrived=100.0)
    assert run.tokens_per_second is run.time_to_first_token is None
    for _ in range(3):
        run.note_tokens(2)  # at 103, 104, 105
    assert run.time_to_first_token == 3.0
    assert run.tokens_per_second == 2.5


def test_a_run_is_stopped_once_and_for_one_reason() -> None:
    async def scenario() -> None:
        run = Run("/v1/completions")
        run.leave()  # before there is anything to stop
        run.task = asyncio.create_task(asyncio.sleep(60))
        run.leave()
        run.shut_down()
        with pytest.raises(asyncio.CancelledError):
            await run.task
        assert run.refusal is not None
        assert run.refusal.status == 499

    in_loop(scenario)
