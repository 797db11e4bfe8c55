"""What a model's process does with requests that are too long, or that its own code fails on."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemerge.runtime.engine.process import EngineFailure
from tests.support.engines import Engine

pytestmark = pytest.mark.llama


def test_one_answer_has_its_own_limit_in_a_larger_cache(tiny_gguf: Path) -> None:
    with Engine(tiny_gguf, n_ctx=256, n_sequences=4, n_longest=32) as engine:
        assert engine.facts.n_ctx == 32
        with pytest.raises(EngineFailure, match="the context is 32") as caught:
            engine.ask([5] * 32)
        assert caught.value.status == 400
        told = engine.ask([5] * 30, 9)
        assert told.ended is not None
        assert told.ended.n_generated <= 2


def test_a_fault_of_its_own_is_an_answer(tiny_gguf: Path) -> None:
    with Engine(tiny_gguf) as engine:
        with pytest.raises(EngineFailure, match="TypeError") as caught:
            engine.run(engine.process.detokenize(["no token"]))  # type: ignore[list-item]
        assert caught.value.status == 500
        assert engine.run(engine.process.tokenize("the", add_special=False))
