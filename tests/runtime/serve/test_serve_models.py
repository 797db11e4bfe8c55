from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.errors import BudgetError, FormatError, RecipeError, RuntimeFailure
from edgemerge.runtime.library import load_library
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.models import ModelFile, ModelStore, read_model_file
from tests.runtime.test_llama import add_lora, write_lora
from tests.support.serving import Serving, make_served_gguf
from tests.support.tiny_gguf import CONTEXT, write_tiny_gguf

MIB = 1 << 20


class FakeModel:
    def __init__(self, name: str) -> None:
        self.name = name
        self.is_open = True

    def close(self) -> None:
        self.is_open = False


class Loader:
    """Loads fakes, and fails where the file says so."""

    def __init__(self) -> None:
        self.loaded: list[FakeModel] = []

    def __call__(self, file: ModelFile) -> FakeModel:
        if file.path.read_text() == "bad":
            raise RuntimeFailure(f"{file.path}: cannot be served")
        self.loaded.append(FakeModel(file.name))
        return self.loaded[-1]

    def open_ones(self) -> list[str]:
        return [model.name for model in self.loaded if model.is_open]


def make_store(
    folder: Path, needs: dict[str, int], budget: int, loader: Loader, text: str = ""
) -> ModelStore:
    files = []
    for name, need in needs.items():
        path = folder / f"{name}.gguf"
        path.write_text(text)
        files.append(ModelFile(name, path, 64, 0, need * MIB, {}, 0))
    return ModelStore(files, loader, budget=budget * MIB, floor=100 * MIB)


def test_models_are_loaded_when_asked_for_and_kept(tmp_path: Path) -> None:
    loader = Loader()
    store = make_store(tmp_path, {"a": 10, "b": 20}, 200, loader)
    assert store.loaded == ()
    first = store("b")
    assert store("b") is first
    assert store(None) is store("a")  # the first one is the default
    assert loader.open_ones() == ["b", "a"]
    assert list(store) == ["a", "b"]
    store.close()
    assert loader.open_ones() == []


def test_the_longest_unused_is_closed(tmp_path: Path) -> None:
    loader = Loader()
    store = make_store(tmp_path, {"a": 40, "b": 40, "c": 50}, 200, loader)
    for name in ("a", "b", "a", "c"):
        store(name)
    assert sorted(loader.open_ones()) == ["a", "c"]
    store("b")
    assert sorted(loader.open_ones()) == ["b", "c"]


def test_a_model_as_large_as_the_budget_is_alone(tmp_path: Path) -> None:
    loader = Loader()
    store = make_store(tmp_path, {"a": 40, "b": 40, "c": 100}, 200, loader)
    for name in ("a", "b", "c"):
        store(name)
    assert loader.open_ones() == ["c"]


def test_a_model_that_cannot_fit_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="smaller --ctx") as caught:
        make_store(tmp_path, {"a": 40, "b": 101}, 200, Loader())
    assert caught.value.needed == 201 * MIB


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    file = ModelFile("a", tmp_path / "a.gguf", 64, 0, 0, {}, 0)
    other = ModelFile("a", tmp_path / "other" / "a.gguf", 64, 0, 0, {}, 0)
    with pytest.raises(RecipeError, match="two models are called a"):
        ModelStore([file, other], Loader(), budget=1, floor=0)


def test_unknown_gone_and_bad_models_are_refused_without_a_path(tmp_path: Path) -> None:
    loader = Loader()
    store = make_store(tmp_path, {"a": 10, "b": 10}, 200, loader)
    with pytest.raises(Refusal, match="does not exist") as caught:
        store("gpt-4")
    assert caught.value.status == 404
    (tmp_path / "b.gguf").unlink()
    with pytest.raises(Refusal) as caught:
        store("b")
    assert caught.value.status == 503
    (tmp_path / "a.gguf").write_text("bad")
    with pytest.raises(Refusal) as caught:
        store("a")
    assert caught.value.status == 500
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(RuntimeFailure, match=r"a\.gguf"):  # at the start the user hears the reason
        store.preload()


def test_names_and_figures_come_from_the_file(tiny_gguf: Path) -> None:
    file = read_model_file(str(tiny_gguf))
    assert (file.name, file.path, file.n_ctx) == ("tiny", tiny_gguf, CONTEXT)
    assert file.tokenizer == {"bos_token": "<s>", "eos_token": "</s>", "chat_template": None}
    named = read_model_file(f"ward-7={tiny_gguf}", 32)
    assert (named.name, named.path, named.n_ctx) == ("ward-7", tiny_gguf, 32)
    assert file.n_bytes < named.need < file.need


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x=y.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="x=y"):
        read_model_file(str(path))
    with pytest.raises(RuntimeFailure, match="no such file"):
        read_model_file(str(tmp_path / "nothing.gguf"))
    with pytest.raises(RuntimeFailure, match="edgemerge convert"):
        read_model_file(str(tmp_path))


@pytest.mark.llama
def test_the_estimate_holds(tiny_gguf: Path) -> None:
    from edgemerge.runtime.serve.llama import ServedLlama

    file = read_model_file(str(tiny_gguf))
    model = ServedLlama(tiny_gguf, n_ctx=file.n_ctx, n_threads=1)
    try:
        buffers = load_library().buffers()
    finally:
        model.close()
    reported = buffers.weights + buffers.kv + buffers.compute + buffers.output
    assert reported < file.need < 1.5 * reported


@pytest.mark.llama
def test_two_models_take_turns_in_the_room_for_one(tmp_path: Path, models_dir: Path) -> None:
    ggufs = [make_served_gguf(models_dir, tmp_path / f"{n}.gguf", n) for n in ("base", "expert-a")]
    with Serving(*ggufs) as server:
        floor = server.health()["memory"]["rss"]
    # room for either model beside what the process takes anyway, not for both
    budget = floor + read_model_file(str(ggufs[0])).need // 2
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
