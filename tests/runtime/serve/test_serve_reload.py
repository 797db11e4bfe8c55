"""Files that are replaced: beside the old model, and while it is closed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edgemerge.runtime.serve import reload as reload_module
from edgemerge.runtime.serve import store as store_module
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.loaded import Loaded
from edgemerge.runtime.serve.queue import Room
from edgemerge.runtime.serve.reload import Reloader
from tests.runtime.serve.test_serve_models import in_loop, make_store, use
from tests.support.fake_process import Loader
from tests.support.replaced_files import MIB, ODD, end_process, read_again, write_new


def test_a_start_takes_the_header_of_now(tmp_path: Path) -> None:
    """Fault: a model that had been closed was started with what its old file needed."""

    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 10, "b": 50}, 200, loader, read_again)
        await use(store, "a", "b")
        end_process(loader, store, "a")
        write_new(store, "a", 30)
        await use(store, "a")
        assert store.resolve("a").need == 30 * MIB
        assert store.taken == 180 * MIB
        end_process(loader, store, "a")
        write_new(store, "a", 101)
        with pytest.raises(Refusal, match="too large for the server's memory") as caught:
            await store.open("a")
        assert caught.value.status == 503
        assert loader.alive() == ["b"]  # closing it would be no use

    in_loop(scenario)


def test_closed_models_are_reloaded_where_their_files_are_new(
    tmp_path: Path, asked: list[str]
) -> None:
    """Fault: a reload passed by what was closed, and the next request started it unasked."""

    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, dict.fromkeys("abcd", 10), 200, loader, read_again)
        await use(store, "a", "b", "c")
        for name in "bc":
            end_process(loader, store, name)
        write_new(store, "b", 15)
        store.resolve("d").path.unlink()
        await Reloader(store).reload_all()
        await asyncio.sleep(0.01)
        assert loader.alive() == ["a", "b"]
        assert store.resolve("b").need == 15 * MIB
        assert asked == ["b"]  # the file of a is the one that answers
        assert [state.starts for state in store.states()] == [2, 2, 1, 0]

    in_loop(scenario)


def test_a_model_that_is_being_asked_counts(tmp_path: Path) -> None:
    """Fault: from its load to its first request a new model had no place in the budget."""

    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 50, "b": 60}, 220, loader)
        await use(store, "a")
        new = await store.start(store.resolve("a"))
        new.process.pid = 7  # type: ignore[misc]
        assert store.pids == [7]
        assert store.taken == 200 * MIB
        store.take("a")  # so that the old one is not closed
        assert store.room_for("b") is Room.SHUT
        with pytest.raises(Refusal, match="no room in memory"):
            await store.start(store.resolve("b"))
        store.give_back("a")
        await store.drop(new)
        assert (store.pids, store.taken) == ([], 150 * MIB)
        await use(store, "b")
        assert loader.alive() == ["a", "b"]

    in_loop(scenario)


@pytest.mark.parametrize("is_odd", [False, True])
def test_who_asks_for_a_closed_model_waits_for_its_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_odd: bool
) -> None:
    """Fault: the request started the same file unasked, which was then compared with itself."""

    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 60}, 200, loader, read_again)
        is_asked, may_answer = asyncio.Event(), asyncio.Event()

        async def ask(loaded: Loaded) -> str | None:
            is_asked.set()
            await may_answer.wait()
            return "it has no answer to a simple question" if is_odd else None

        monkeypatch.setattr(reload_module, "_find_oddity", ask)
        write_new(store, "a", 70)
        reloading = asyncio.create_task(Reloader(store).reload("a"))
        await is_asked.wait()
        using = asyncio.create_task(use(store, "a"))
        await asyncio.sleep(0.05)
        assert len(loader.started) == 1
        may_answer.set()
        if is_odd:
            for task, says in ((reloading, "the old one is closed"), (using, "has refused")):
                with pytest.raises(Refusal, match=says):
                    await task
        else:
            await asyncio.gather(reloading, using)
        assert loader.alive() == ([] if is_odd else ["a"])
        assert len(loader.started) == 1

    in_loop(scenario)


def test_the_old_model_stays_while_the_new_file_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: where it was closed meanwhile, and the new file refused, nothing could answer."""
    monkeypatch.setattr(store_module, "_WATCH_SECONDS", 0.02)

    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 10}, 200, loader, read_again)

        async def ask(loaded: Loaded) -> str | None:
            if loaded.file.need != ODD * MIB:
                return None
            await asyncio.sleep(0.3)
            return "it has no answer to a simple question"

        monkeypatch.setattr(reload_module, "_find_oddity", ask)
        await use(store, "a")
        watching = asyncio.create_task(store.watch(0.05))
        write_new(store, "a", ODD)
        with pytest.raises(Refusal, match="the old one goes on"):
            await Reloader(store).reload("a")
        watching.cancel()
        assert loader.alive() == ["a"]

    in_loop(scenario)


def test_who_waits_hears_of_the_end_of_a_reload(tmp_path: Path, asked: list[str]) -> None:
    async def scenario() -> None:
        store = make_store(tmp_path, {"a": 30, "b": 80}, 200, Loader(), read_again)
        await use(store, "a")
        rooms: list[Room] = []
        store.changed = lambda: rooms.append(store.room_for("b"))
        write_new(store, "a", 25)
        await Reloader(store).reload("a")
        assert rooms[0] is Room.SHUT
        assert rooms[-1] is Room.FREE

    in_loop(scenario)


def test_a_reload_beside_a_first_start_leaves_one_process(tmp_path: Path) -> None:
    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 10}, 200, loader)
        loader.may_go.clear()
        opening = asyncio.create_task(store.open("a"))
        await asyncio.sleep(0.01)
        reloading = asyncio.create_task(Reloader(store).reload("a"))
        await asyncio.sleep(0.01)
        loader.may_go.set()
        store.release(await opening)
        await reloading
        await asyncio.sleep(0.01)
        assert loader.alive() == ["a"]

    in_loop(scenario)
