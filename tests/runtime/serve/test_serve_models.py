from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.errors import BudgetError, FormatError, RecipeError, RuntimeFailure
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.machine.process import read_process
from edgemerge.runtime.doctor.fit import PROCESS_BYTES
from edgemerge.runtime.model_files import open_gguf
from edgemerge.runtime.serve import models as models_module
from edgemerge.runtime.serve import store as store_module
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.models import ModelFile, read_model_file, read_stamps
from edgemerge.runtime.serve.queue import Room
from edgemerge.runtime.serve.store import ModelStore
from tests.runtime.test_llama import add_lora, write_lora
from tests.support.engines import Engine
from tests.support.fake_process import Loader, keep
from tests.support.replaced_files import MIB
from tests.support.serving import Serving, make_served_gguf
from tests.support.tiny_gguf import CONTEXT, write_tiny_gguf


def in_loop(scenario: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(10):
            await scenario()

    asyncio.run(limited())


def make_store(
    folder: Path,
    needs: dict[str, int],
    budget: int,
    loader: Loader,
    read: Callable[[ModelFile], Awaitable[ModelFile]] = keep,
) -> ModelStore:
    files = []
    for name, need in needs.items():
        path = folder / f"{name}.gguf"
        path.touch()
        stamps = read_stamps(path)
        files.append(ModelFile(name, path, 64, 0, need * MIB, {}, 0, n_sequences=2, stamps=stamps))
    return ModelStore(files, loader, read, budget=budget * MIB, floor=100 * MIB)


async def watch_for_a_while(store: ModelStore) -> None:
    """Let a store close what nobody uses for a twentieth of a second."""
    watching = asyncio.create_task(store.watch(0.05))
    await asyncio.sleep(0.3)
    watching.cancel()


async def use(store: ModelStore, *names: str) -> None:
    """Ask each model once, one after the other."""
    for name in names:
        assert store.room_for(name) is Room.FREE
        store.take(name)
        store.release(await store.open(name))
        store.give_back(name)


def test_models_are_started_when_asked_for_and_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 10, "b": 20}, 200, loader)
        assert store.loaded == ()
        await use(store, "b", "b", "a")
        assert loader.alive() == ["b", "a"]
        assert [file.name for file in store] == ["a", "b"]
        assert store.resolve(None).name == "a"
        await store.close()
        assert loader.alive() == []

    in_loop(scenario)


def test_the_longest_unused_is_closed(tmp_path: Path) -> None:
    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 40, "b": 40, "c": 50}, 200, loader)
        await use(store, "a", "b", "a", "c")
        assert sorted(loader.alive()) == ["a", "c"]
        await use(store, "b")
        assert sorted(loader.alive()) == ["b", "c"]

    in_loop(scenario)


def test_a_model_as_large_as_the_budget_is_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 40, "b": 40, "c": 100}, 200, loader)
        await use(store, "a", "b", "c")
        assert loader.alive() == ["c"]

    in_loop(scenario)


def test_what_is_in_use_is_not_closed(tmp_path: Path) -> None:
    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 60, "b": 60}, 200, loader)
        store.take("a")
        assert store.room_for("b") is Room.SHUT  # before "a" is there
        used = await store.open("a")
        assert (store.room_for("a"), store.room_for("b")) == (Room.FREE, Room.SHUT)
        store.take("a")
        assert store.room_for("a") is Room.FULL
        store.give_back("a")
        store.release(used)
        store.give_back("a")
        await use(store, "b")
        assert loader.alive() == ["b"]

    in_loop(scenario)


def test_one_start_serves_all_who_wait_even_if_the_first_leaves(tmp_path: Path) -> None:
    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 60}, 200, loader)
        loader.may_go.clear()
        waiting = [asyncio.create_task(store.open("a")) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert store.states()[0].state == "loading"
        waiting[0].cancel()
        await asyncio.sleep(0.01)
        loader.may_go.set()
        assert (await waiting[1]).users == 1
        assert len(loader.started) == 1

    in_loop(scenario)


def test_a_process_that_ends_is_started_again_and_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 10, "b": 10}, 200, loader)
        await use(store, "a", "b")
        loader.started[0].is_alive = False
        state, other = store.states()
        assert (state.state, state.starts, state.crashes) == ("crashed", 1, 1)
        assert (other.state, other.crashes) == ("loaded", 0)
        await use(store, "a")
        state, _ = store.states()
        assert (state.state, state.starts, state.crashes) == ("loaded", 2, 1)
        assert caplog.text.count("the process of a has ended") == 1

    in_loop(scenario)


def test_a_new_model_takes_over_and_the_old_one_ends_with_its_last_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 10}, 200, loader)
        await use(store, "a")
        before = await store.open("a")
        store.adopt(await store.start(store.resolve("a")))
        after = await store.open("a")
        assert (before.facts.fingerprint, after.facts.fingerprint) == ("fp_1", "fp_2")
        assert loader.alive() == ["a", "a"]
        store.release(before)
        await asyncio.sleep(0.01)
        assert [process.is_alive for process in loader.started] == [False, True]
        store.release(after)
        assert store.loaded == ("a",)

    in_loop(scenario)


def test_a_new_model_needs_room_beside_the_old_one_and_takes_that_of_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 50, "b": 40, "c": 60}, 200, loader)
        await use(store, "a", "b")
        store.adopt(await store.start(store.resolve("a")))
        await asyncio.sleep(0.01)
        assert loader.alive() == ["a"]
        assert store.loaded == ("a",)
        await use(store, "c")
        with pytest.raises(Refusal, match="no room in memory for the new model beside") as caught:
            await store.start(store.resolve("c"))
        assert caught.value.status == 503
        assert loader.alive() == ["c"]
        await use(store, "a")
        store.take("a")
        with pytest.raises(Refusal, match="no room in memory for the model while others answer"):
            await store.start(store.resolve("c"))

    in_loop(scenario)


def test_who_is_idle_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_WATCH_SECONDS", 0.02)

    async def scenario() -> None:
        loader = Loader()
        store = make_store(tmp_path, {"a": 10, "b": 10}, 200, loader)
        await use(store, "a")
        store.take("b")
        await store.open("b")
        await watch_for_a_while(store)
        assert loader.alive() == ["b"]
        assert [state.state for state in store.states()] == ["closed", "loaded"]

    in_loop(scenario)


def test_a_model_that_cannot_fit_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="smaller --ctx") as caught:
        make_store(tmp_path, {"a": 40, "b": 101}, 200, Loader())
    assert caught.value.needed == 201 * MIB


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    file = ModelFile("a", tmp_path / "a.gguf", 64, 0, 0, {}, 0)
    other = ModelFile("a", tmp_path / "other" / "a.gguf", 64, 0, 0, {}, 0)
    with pytest.raises(RecipeError, match="two models are called a"):
        ModelStore([file, other], Loader(), keep, budget=1, floor=0)


def test_unknown_gone_and_bad_models_are_refused_without_a_path(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make_store(tmp_path, {"a": 10, "b": 10}, 200, Loader())
        with pytest.raises(Refusal, match="does not exist") as caught:
            store.resolve("gpt-4")
        assert caught.value.status == 404
        (tmp_path / "b.gguf").unlink()
        with pytest.raises(Refusal) as caught:
            await store.open("b")
        assert caught.value.status == 503
        (tmp_path / "a.gguf").write_text("bad")
        with pytest.raises(Refusal) as caught:
            await store.open("a")
        assert caught.value.status == 500
        assert str(tmp_path) not in str(caught.value)
        with pytest.raises(RuntimeFailure, match=r"a\.gguf"):  # at the start the user hears why
            await store.start(store.resolve("a"))

    in_loop(scenario)


def test_names_and_figures_come_from_the_file(tiny_gguf: Path) -> None:
    file = read_model_file(tiny_gguf)
    assert (file.name, file.path, file.n_ctx) == ("tiny", tiny_gguf, CONTEXT)
    assert file.tokenizer == {"bos_token": "<s>", "eos_token": "</s>", "chat_template": None}
    named = read_model_file(tiny_gguf, 32, name="ward-7")
    assert (named.name, named.path, named.n_ctx) == ("ward-7", tiny_gguf, 32)
    assert file.n_bytes < named.need < file.need
    assert (file.n_cache, named.n_cache) == (4 * CONTEXT, 4 * 32)
    assert read_model_file(tiny_gguf, 8192).n_ctx == CONTEXT  # it was not trained on more
    assert read_model_file(tiny_gguf, n_sequences=1).n_cache == CONTEXT
    assert read_model_file(tiny_gguf, kv_type="q8_0").need < file.need


def test_a_name_that_clients_cannot_be_told_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copy(tiny_gguf, tmp_path / os.fsdecode(b"caf\xe9.gguf")))
    link = tmp_path / "ward.gguf"
    link.symlink_to(odd)
    for name, path in (("ward", odd), ("ward", link), (odd.stem, tiny_gguf)):
        with pytest.raises(RuntimeFailure, match="is not UTF-8; rename it"):
            read_model_file(path, name=name)
    assert read_model_file(odd).n_ctx == CONTEXT  # as of doctor, which tells nobody


def test_less_is_kept_where_memory_is_short_but_one_request_fits(tiny_gguf: Path) -> None:
    file = read_model_file(tiny_gguf)
    assert file.within(file.need) == file
    less = file.within(file.need - 100 * file.token_bytes)
    assert less.n_cache == file.n_cache - 100
    assert file.within(0).n_cache == file.n_ctx


def test_a_file_that_is_replaced_while_it_is_read_is_refused(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the header of the old file had the stamps of the new one, so a reload did not ask that."""
    path = Path(shutil.copy(tiny_gguf, tmp_path / "a.gguf"))
    new = Path(shutil.copy(tiny_gguf, tmp_path / "new.gguf"))

    def open_old(path: Path) -> GgufModel:
        source = open_gguf(path)
        new.replace(path)
        return source

    monkeypatch.setattr(models_module, "open_gguf", open_old)
    with pytest.raises(RuntimeFailure, match=r"a\.gguf: changed while it was read"):
        read_model_file(path)


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x=y.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="x=y"):
        read_model_file(path)
    with pytest.raises(RuntimeFailure, match="no such file"):
        read_model_file(tmp_path / "nothing.gguf")
    with pytest.raises(RuntimeFailure, match="edgemerge convert"):
        read_model_file(tmp_path)


@pytest.mark.llama
def test_the_estimate_holds(tiny_gguf: Path) -> None:
    file = read_model_file(tiny_gguf)
    with Engine(tiny_gguf, n_ctx=file.n_cache, n_sequences=file.n_sequences) as engine:
        reported = sum(engine.facts.memory.values())
        pid = engine.process.pid
        assert pid is not None
        assert read_process(pid).rss < file.need
    assert reported < file.need - PROCESS_BYTES


@pytest.mark.llama
def test_two_models_take_turns_in_the_room_for_one(tmp_path: Path, models_dir: Path) -> None:
    ggufs = [make_served_gguf(models_dir, tmp_path / f"{n}.gguf", n) for n in ("base", "expert-a")]
    with Serving(*ggufs) as server:
        floor = server.health()["memory"]["rss"]
    # room for either model beside what the process takes anyway, not for both
    budget = floor + read_model_file(ggufs[0]).need // 2
    ask = {"prompt": "Question: what is it?\nAnswer:", "max_tokens": 4, "temperature": 0}
    with Serving(*ggufs, "--memory", budget) as server:
        texts: dict[str, list[Any]] = {}
        for name in ("base", "expert-a", "base", "expert-a"):
            answer = server.post("/v1/completions", {"model": name, **ask})
            assert answer.status == 200
            text = answer.json["choices"][0]["text"]
            assert texts.setdefault(name, text) == text
            loaded = [model["id"] for model in server.health()["models"] if model["loaded"]]
            assert loaded == [name]
        assert server.health()["memory"]["rss"] < budget + (16 << 20)


@pytest.mark.llama
def test_a_file_that_goes_or_breaks_does_not_end_the_server(tmp_path: Path) -> None:
    ggufs = [write_tiny_gguf(tmp_path / f"{name}.gguf") for name in "abc"]
    with Serving(*ggufs) as server:
        ggufs[1].unlink()
        ggufs[2].write_bytes(b"GGUF" + bytes(100))
        for name, status in (("b", 503), ("c", 500), ("a", 200)):
            answer = server.post("/v1/completions", {"model": name, "prompt": "x", "max_tokens": 2})
            assert answer.status == status
            assert str(tmp_path).encode() not in answer.body
        answer = server.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}
        )
        assert "no chat template" in answer.error["message"]
        assert "c.gguf" in server.log()


@pytest.mark.llama
def test_a_lora_is_added(tiny_gguf: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.gguf")
    merged = add_lora(tiny_gguf, lora, tmp_path / "merged.gguf", 2.0)
    ask = {"prompt": "the answer", "max_tokens": 0, "echo": True, "logprobs": 0}

    def logprobs(*arguments: object) -> list[float]:
        with Serving(*arguments) as server:
            choice = server.post("/v1/completions", ask).json["choices"][0]
        found: list[float] = choice["logprobs"]["token_logprobs"]
        return found

    with_lora = logprobs(tiny_gguf, "--lora", f"{lora}=2")
    np.testing.assert_allclose(with_lora, logprobs(merged), atol=2e-3)
    assert np.abs(np.subtract(with_lora, logprobs(tiny_gguf))).max() > 0.05


def test_layers_of_rpc_workers_take_no_memory_here(tiny_gguf: Path) -> None:
    here, half, away = (read_model_file(tiny_gguf, rpc_layers=n) for n in (0, 1, 1000))
    assert here.base > half.base > away.base
    assert here.token_bytes > half.token_bytes > away.token_bytes
    source = open_gguf(tiny_gguf)
    table = source.specs()["token_embd.weight"].nbytes
    weights = sum(spec.nbytes for spec in source.specs().values())
    source.close()
    assert here.base - away.base == weights - table
