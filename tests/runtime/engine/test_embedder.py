"""The embedder's texts one by one, beside answers that take the cache."""

from __future__ import annotations

from typing import Any

import pytest

from edgemerge.runtime.engine.embedding import Embedder, EmbeddingJob
from edgemerge.runtime.engine.messages import Failed
from edgemerge.runtime.engine.slots import Slots
from edgemerge.runtime.engine.store import Store
from tests.support.fake_llama import FakeContext, FakeLlama, FakeModel

NAN = -1  # a token whose embedding is none


class Bench:
    """An embedder in a cache of some size, stepped by hand."""

    def __init__(self, n_ctx: int, n_rows: int = 8, *, whole: bool = False) -> None:
        self.api = FakeLlama()
        context: Any = FakeContext(self.api, n_ctx)
        model: Any = FakeModel(self.api)
        slots = Slots(self.api, None, 2, 0, Store(self.api, None, 0), keeps_state=False)
        self.embedder = Embedder(model, context, slots, range(2, 8), n_rows=n_rows, whole=whole)
        self.came: dict[int, Any] = {}

    def finish(self) -> dict[int, Any]:
        while not self.embedder.is_idle:
            for key, event in self.embedder.step(others=False):
                assert key not in self.came
                self.came[key] = event
        return self.came


@pytest.mark.parametrize("ranks", [False, True])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_text_without_a_vector_fails_its_request_alone(bad: int, ranks: bool) -> None:
    bench = Bench(64, whole=ranks)
    texts = [[5], [6], [7]]
    texts[bad] = [NAN]
    bench.embedder.add(EmbeddingJob(1, texts, ranks))
    bench.embedder.add(EmbeddingJob(2, [[3, 4]], ranks))
    came = bench.finish()
    assert isinstance(came[1], Failed)
    assert came[2] == ([3.0] if ranks else [pytest.approx([0.9487, 0.3162], abs=1e-4)], 2)
    assert bench.api.n_taken == 0
