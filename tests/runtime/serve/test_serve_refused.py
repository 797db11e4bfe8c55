"""Files that a reload refuses: what answers then, and what no start takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemerge.runtime.serve import reload as reload_module
from edgemerge.runtime.serve import store as store_module
from edgemerge.runtime.serve.errors import BUSY, SERVER, Refusal
from edgemerge.runtime.serve.loaded import Loaded
from edgemerge.runtime.serve.queue import Room
from edgemerge.runtime.serve.reload import Reloader
from tests.runtime.serve.test_serve_models import in_loop, make_store, use, watch_for_a_while
from tests.support.fake_process import Loader
from tests.support.replaced_files import MIB, ODD, FullLoader, end_process, read_again, write_new


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
        await watch_for_a_while(store)
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


def test_a_reload_never_refuses_the_file_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a second copy without memory had it refused; once the first one crashed, nothing answered."""
    monkeypatch.setattr(store_module, "_WATCH_SECONDS", 0.02)

    async def scenario() -> None:
        loader = FullLoader()
        store = make_store(tmp_path, {"a": 10}, 200, loader, read_again)
        await use(store, "a")
        with pytest.raises(Refusal, match="it does not load") as caught:
            await Reloader(store).reload("a")
        assert caught.value.code == "model_refused"
        end_process(loader, store, "a")
        await use(store, "a")
        with pytest.raises(Refusal):
            await Reloader(store).reload("a")
        await watch_for_a_while(store)
        assert loader.alive() == []  # nobody used it

    in_loop(scenario)


def test_a_file_that_did_not_load_beside_the_old_one_is_tried_once_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: it was refused for good, though only memory for both was missing."""
    monkeypatch.setattr(store_module, "_WATCH_SECONDS", 0.02)

    async def scenario() -> None:
        loader = FullLoader()
        store = make_store(tmp_path, {"a": 10}, 200, loader, read_again)
        await use(store, "a")
        write_new(store, "a", 15)
        with pytest.raises(Refusal, match="it does not load"):
            await Reloader(store).reload("a")
        await watch_for_a_while(store)
        assert loader.alive() == ["a"]
        end_process(loader, store, "a")
        await use(store, "a")
        assert store.resolve("a").need == 15 * MIB

    in_loop(scenario)


def test_a_better_file_that_comes_while_another_is_asked_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: what lay in the model's place after the question was refused, not what had been asked."""

    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 10}, 200, loader, read_again)

        async def ask(loaded: Loaded) -> str | None:
            write_new(store, "a", 15)
            return "it has no answer to a simple question"

        monkeypatch.setattr(reload_module, "_find_oddity", ask)
        write_new(store, "a", ODD)
        with pytest.raises(Refusal, match="no answer"):
            await Reloader(store).reload("a")
        await use(store, "a")
        assert store.resolve("a").need == 15 * MIB

    in_loop(scenario)


def test_an_old_model_whose_new_file_is_refused_makes_no_room(
    tmp_path: Path, asked: list[str]
) -> None:
    """Fault: it was closed for another one, and then its requests got 503."""

    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 60, "b": 60}, 200, loader, read_again)
        await use(store, "a")
        write_new(store, "a", ODD)
        with pytest.raises(Refusal, match="no answer to a simple question"):
            await Reloader(store).reload("a")
        assert store.room_for("b") is Room.FREE  # else requests for a would wait behind it, in vain
        with pytest.raises(Refusal, match="whose new file a reload has refused") as caught:
            await store.open("b")
        assert (caught.value.status, caught.value.kind) == (503, BUSY)
        store.resolve("a").path.unlink()
        with pytest.raises(Refusal, match="whose new file a reload has refused"):
            await store.open("b")
        assert loader.alive() == ["a"]
        write_new(store, "a", 15)
        await use(store, "b", "a")
        assert loader.alive() == ["b", "a"]

    in_loop(scenario)


def test_who_waits_for_others_waits_beside_a_model_that_stays(
    tmp_path: Path, asked: list[str]
) -> None:
    async def scenario() -> None:
        store = make_store(tmp_path, {"a": 30, "b": 30, "c": 50}, 200, Loader(), read_again)
        await use(store, "a", "b")
        write_new(store, "a", ODD)
        with pytest.raises(Refusal, match="no answer to a simple question"):
            await Reloader(store).reload("a")
        store.take("b")
        assert store.room_for("c") is Room.SHUT
        store.give_back("b")
        await use(store, "c")
        assert store.loaded == ("a", "c")

    in_loop(scenario)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_new_file_that_never_fits_is_refused(tmp_path: Path, is_loaded: bool) -> None:
    """Fault: the server said that it was busy, so that no update was ever rolled back."""

    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 10, "b": 10}, 200, loader, read_again)
        await use(store, *("ab" if is_loaded else "b"))
        write_new(store, "a", 101)
        with pytest.raises(Refusal, match="too large for the server's memory") as caught:
            await Reloader(store).reload("a")
        assert (caught.value.status, caught.value.kind) == (409, SERVER)
        assert caught.value.retry_after is None
        assert "b" in loader.alive()
        end_process(loader, store, "a")
        with pytest.raises(Refusal, match="too large for the server's memory") as caught:
            await store.open("a")
        assert (caught.value.status, caught.value.kind) == (503, SERVER)
        assert caught.value.retry_after is None

    in_loop(scenario)
