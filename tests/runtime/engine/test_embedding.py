from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgemerge.runtime.engine.messages import Generation
from edgemerge.runtime.engine.process import EngineFailure
from edgemerge.runtime.engine.vectors import read_vector
from edgemerge.types import Float32
from tests.support import tiny_bert
from tests.support.engines import GREEDY, Engine, Told, collect
from tests.support.tiny_bert import write_tiny_bert
from tests.support.tiny_gguf import CONTEXT

pytestmark = pytest.mark.llama

TEXTS: list[str | list[int]] = ["the answer", "of", "the answer of the answer in the end" * 3]


@pytest.fixture(scope="module")
def engine(tiny_gguf: Path) -> Iterator[Engine]:
    with Engine(tiny_gguf, n_ctx=CONTEXT, n_sequences=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = write_tiny_bert(tmp_path_factory.mktemp("bert") / "bert.gguf")
    with Engine(path, n_sequences=4) as opened:
        yield opened


def embed(engine: Engine, texts: list[str | list[int]]) -> tuple[list[Float32], int]:
    vectors, n_tokens = engine.run(engine.process.embed(texts))
    return [read_vector(vector) for vector in vectors], n_tokens


@pytest.mark.parametrize("which", ["engine", "encoder"])
def test_inputs_together_are_as_inputs_alone(which: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(which)
    texts: list[str | list[int]] = TEXTS if which == "engine" else ["a b", "c", "a b c d e f g"]
    vectors, n_tokens = embed(engine, texts * 4)
    assert len(vectors) == 4 * len(texts)
    alone = [embed(engine, [text]) for text in texts]
    assert n_tokens == 4 * sum(n for _, n in alone)
    for i, vector in enumerate(vectors):
        assert np.linalg.norm(vector) == pytest.approx(1.0)
        assert vector == pytest.approx(alone[i % len(texts)][0][0], abs=2e-3)


def test_texts_are_embedded_beside_answers(engine: Engine) -> None:
    plain = engine.ask("the answer", 20).text
    vectors, _ = embed(engine, TEXTS)

    async def both() -> tuple[str, list[str]]:
        told, (found, _) = await asyncio.gather(
            collect(engine.process, Generation("the answer", 20, GREEDY)),
            engine.process.embed(TEXTS),
        )
        return told.text, found

    text, found = engine.run(both())
    assert text == plain
    assert np.allclose([read_vector(vector) for vector in found], vectors, atol=2e-3)


def test_an_answer_goes_on_where_embeddings_have_the_cache(tiny_gguf: Path) -> None:
    prompt, text = "x" * 120, "y" * 200
    with Engine(tiny_gguf, n_ctx=CONTEXT, n_sequences=2) as engine:
        plain = engine.ask(prompt, 100).text
        vectors, _ = embed(engine, [text])

        async def both() -> tuple[Told, list[str]]:
            told, (found, _) = await asyncio.gather(
                collect(engine.process, Generation(prompt, 100, GREEDY)),
                engine.process.embed([text]),
            )
            return told, found

        told, found = engine.run(both())
    assert told.reason in ("length", "loop")
    assert told.text == plain
    assert np.allclose([read_vector(vector) for vector in found], vectors, atol=2e-3)


def test_an_encoder_writes_nothing(encoder: Engine) -> None:
    assert encoder.facts.reads_whole
    assert not encoder.facts.has_template
    with pytest.raises(EngineFailure, match="does not continue") as caught:
        encoder.ask("a b")
    assert caught.value.status == 400


def test_what_cannot_be_embedded_is_refused(engine: Engine, encoder: Engine) -> None:
    for one, text in ((encoder, "a " * 100), (engine, "x" * 1000), (engine, [10**6]), (engine, [])):
        with pytest.raises(EngineFailure) as caught:
            one.run(one.process.embed([text]))
        assert caught.value.status == 400
    assert engine.run(engine.process.embed([])) == ([], 0)
    with pytest.raises(EngineFailure, match="does not order"):
        engine.run(engine.process.rerank("the", ["answer"]))


def test_thousands_of_vectors_take_little_more_than_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: as Python's floats and as JSON they took a hundred bytes a number, in both processes."""
    n, width = 2048, 256
    monkeypatch.setattr(tiny_bert, "N_EMBD", width)
    path = write_tiny_bert(tmp_path / "wide.gguf")
    with Engine(path, n_sequences=4) as engine:
        tracemalloc.start()
        try:
            vectors, _ = engine.run(engine.process.embed(["a"] * n))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(vectors) == n
        assert len(read_vector(vectors[-1])) == width
        assert peak < 10 * n * width
        with pytest.raises(EngineFailure, match="send at most 16384 at a time") as caught:
            engine.run(engine.process.embed(["a"] * 16385))
        assert caught.value.status == 400
