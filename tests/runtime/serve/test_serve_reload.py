"""Files that are replaced: beside the old model, while it is closed, and those that are refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from edgemerge.runtime.serve import reload as reload_module
from edgemerge.runtime.serve import store as store_module
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.loaded import Loaded
from edgemerge.runtime.serve.models import ModelFile, read_stamps
from edgemerge.runtime.serve.queue import Room
from edgemerge.runtime.serve.reload import Reloader
from edgemerge.runtime.serve.store import ModelStore
from tests.runtime.serve.test_serve_models import MIB, in_loop, make_store, use
from tests.support.fake_process import Loader

ODD = 20  # MiB of a model that has no answer


async def read_again(file: ModelFile) -> ModelFile:
    """Read what a model needs: a file that was replaced has its MiB in it."""
    text = file.path.read_text()
    base = int(text) * MIB if text else file.base
    return replace(file, base=base, stamps=read_stamps(file.path))


def write_new(store: ModelStore, name: str, mib: int) -> None:
    """Put another file in the place of a model's."""
    path = store.resolve(name).path
    other = path.with_suffix(".new")
    other.write_text(f"{mib}")
    other.replace(path)


def end_process(loader: Loader, store: ModelStore, name: str) -> None:
    for process in loader.started:
        if process.name == name:
            process.is_alive = False
    store.states()  # takes note of that


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let models be asked without a process; these are the names of those that were."""
    names: list[str] = []

    async def ask(loaded: Loaded) -> str | None:
        names.append(loaded.file.name)
        return "it has no answer to a simple question" if loaded.file.need == ODD * MIB else None

    monkeypatch.setattr(reload_module, "_find_oddity", ask)
    return names


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


def test_what_a_reload_refuses_is_not_taken_by_a_later_start(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: once the old model was closed for want of work, the refused file answered."""
    monkeypatch.setattr(store_module, "_WATCH_SECONDS", 0.02)

    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 10}, 200, loader, read_again)
        reloader = Reloader(store)
        await use(store, "a")
        write_new(store, "a", ODD)
        with pytest.raises(Refusal, match="no answer to a simple question"):
            await reloader.reload("a")
        watching = asyncio.create_task(store.watch(0.05))
        await asyncio.sleep(0.3)
        watching.cancel()
        assert loader.alive() == ["a"]  # the old one, which nothing could replace
        end_process(loader, store, "a")
        with pytest.raises(Refusal, match="has refused the new file") as caught:
            await store.open("a")
        assert caught.value.status == 503
        assert loader.alive() == []
        await reloader.reload("a", asks=False)
        await use(store, "a")
        assert store.resolve("a").need == ODD * MIB
        end_process(loader, store, "a")
        await use(store, "a")  # it is the one that answered last

    in_loop(scenario)


def test_a_better_file_in_the_place_of_a_refused_one_is_taken(
    tmp_path: Path, asked: list[str]
) -> None:
    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 10}, 200, loader, read_again)
        write_new(store, "a", ODD)
        with pytest.raises(Refusal, match="no answer to a simple question"):
            await Reloader(store).reload("a")
        write_new(store, "a", 15)
        await use(store, "a")
        assert store.resolve("a").need == 15 * MIB
        assert asked == ["a"]

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
