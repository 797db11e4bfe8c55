"""The embedder's texts one by one, beside answers that take the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from edgemerge.runtime.engine.answer import Answer
from edgemerge.runtime.engine.embedding import Embedder, EmbeddingJob
from edgemerge.runtime.engine.messages import (
    AllEmbedded,
    Begun,
    Embedded,
    Ended,
    Failed,
    Generation,
    Piece,
)
from edgemerge.runtime.engine.scheduler import Scheduler
from edgemerge.runtime.engine.slots import Slots
from edgemerge.runtime.engine.store import Store
from edgemerge.runtime.engine.vectors import read_vector
from edgemerge.runtime.llama import Model
from tests.support.fake_llama import FakeContext, FakeLlama, FakeModel

NAN = -1  # a token whose embedding is none


class Counting:
    """Draws tokens that never repeat themselves."""

    has_penalties = False

    def sample(self, _context: Any, _place: int) -> int:
        self.last = getattr(self, "last", 1000) + 1
        return self.last


class Bench:
    """Answers and embeddings in a cache of some size, stepped by hand as a model's process does."""

    def __init__(self, n_ctx: int, *, whole: bool = False) -> None:
        self.api = FakeLlama()
        context: Any = FakeContext(self.api, n_ctx)
        self.model = model = cast(Model, FakeModel(self.api))
        slots = Slots(self.api, None, 2, 0, Store(self.api, None, 0), keeps_state=False)
        self.embedder = Embedder(model, context, slots, range(2, 8), n_rows=8, whole=whole)
        self.scheduler = Scheduler(
            model, context, slots, n_chunk=8, n_rows=8, embedder=self.embedder
        )
        self.n_ctx = n_ctx
        self.came: dict[int, Any] = {}  # of texts: vectors or numbers, and how many tokens
        self.found: dict[int, list[Any]] = {}
        self.order: list[int] = []  # of the requests, by their ends

    def answer(self, key: int, prompt: Sequence[int], n: int) -> None:
        wanted, sampler = Generation(list(prompt), n), Counting()
        answer = Answer(key, self.model, wanted, list(prompt), 0, self.n_ctx, sampler)  # type: ignore[arg-type]
        self.scheduler.add(answer)

    def embed(self, key: int, *texts: Sequence[int], ranks: bool = False) -> None:
        self.embedder.add(EmbeddingJob(key, [list(text) for text in texts], ranks))

    def step(self) -> None:
        events: list[tuple[int, Any]] = [*self.scheduler.step()]
        others, is_crowded = self.scheduler.is_computing, self.scheduler.is_crowded
        events += self.embedder.step(others=others, is_crowded=is_crowded)
        for key, event in events:
            if isinstance(event, Embedded):
                value: Any = event.value
                value = list(read_vector(value)) if isinstance(value, str) else value
                self.found.setdefault(key, []).append(value)
            elif not isinstance(event, (Begun, Piece)):
                assert key not in self.came
                if isinstance(event, AllEmbedded):
                    event = (self.found[key], event.n_tokens)
                self.came[key] = event
                self.order.append(key)
        self.scheduler.tidy()

    def finish(self, most: int = 1000) -> dict[int, Any]:
        while not (self.scheduler.is_idle and self.embedder.is_idle):
            self.step()
            most -= 1
            assert most, "it goes round in circles"
        return self.came


@pytest.mark.parametrize("ranks", [False, True])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_text_without_a_vector_fails_its_request_alone(bad: int, ranks: bool) -> None:
    bench = Bench(64, whole=ranks)
    texts = [[5], [6], [7]]
    texts[bad] = [NAN]
    bench.embed(1, *texts, ranks=ranks)
    bench.embed(2, [3, 4], ranks=ranks)
    came = bench.finish()
    assert isinstance(came[1], Failed)
    assert came[2] == ([3.0] if ranks else [pytest.approx([0.9487, 0.3162], abs=1e-4)], 2)
    assert bench.api.n_taken == 0


@pytest.mark.parametrize("n_ctx", [40, 41, 44, 48, 56])
@pytest.mark.parametrize("late", [0, 2, 6])
def test_an_answer_goes_on_where_an_embedding_has_the_cache(n_ctx: int, late: int) -> None:
    bench = Bench(n_ctx)
    bench.embed(1, range(5, 35), [7])
    for _ in range(late):
        bench.step()
    bench.answer(2, range(100, 120), 16)
    came = bench.finish()
    assert came[2] == Ended("length", 16)
    assert [vector[0] / vector[1] for vector in came[1][0]] == pytest.approx([5, 7])


def test_what_gave_way_is_computed_before_answers_that_came_later() -> None:
    bench = Bench(40)
    bench.answer(1, range(100, 120), 16)
    bench.embed(2, range(5, 35))
    for _ in range(20):
        bench.step()
    assert bench.embedder.n_claimed == 30
    for key in (3, 4, 5):
        bench.answer(key, range(100 * key, 100 * key + 20), 16)
    came = bench.finish()
    assert bench.order[:2] == [1, 2]
    assert all(came[key] == Ended("length", 16) for key in (1, 3, 4, 5))


def test_a_text_that_fills_the_cache_does_without_the_one_after_it() -> None:
    bench = Bench(30)
    bench.embed(1, range(5, 34), range(6, 20), [7])
    vectors, n_tokens = bench.finish()[1]
    assert [vector[0] / vector[1] for vector in vectors] == pytest.approx([5, 6, 7])
    assert n_tokens == 29 + 14 + 1
    bench.embed(2, range(31))
    assert isinstance(bench.finish()[2], Failed)
