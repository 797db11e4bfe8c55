from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import FormatError
from edgemerge.runtime.engine.messages import (
    Begun,
    Chat,
    Ended,
    Failed,
    Generation,
    Piece,
    PromptScored,
    Sampling,
    TokenScore,
)
from edgemerge.runtime.engine.options import EngineFacts, EngineOptions
from edgemerge.runtime.engine.wire import Unpacker, pack
from edgemerge.runtime.llama import Lora

SCORE = TokenScore(3, b"\xff\x00a", -0.5, ((1, b"\xe2", -1.0), (2, b"", -9999.0)))
CHAT = Chat([{"role": "user", "content": "Grüße \ud800"}], {"tools": [{"!Piece": ["x", 1, []]}]})
MESSAGES = [
    Begun(3, 1),
    PromptScored([SCORE]),
    Piece("日本", 2, [SCORE]),
    Ended("stop", 3, SCORE),
    Failed("no", 503),
    Generation(CHAT, 5, Sampling(bias=((1, 2.0), (3, -100.0)), seed=4), ("END", "\n")),
    Generation([1, 2], 0, n_alternatives=2, scores_prompt=True),
    EngineOptions(Path("a.gguf"), loras=(Lora(Path("b.gguf"), 0.5),), memory=5),
    EngineFacts(1, 2, 3, True, False, False, "fp", {"kv": 1}),
]


@pytest.mark.parametrize("value", MESSAGES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_values_come_as_they_were(value: Any, size: int) -> None:
    data = pack([(1, value)]) * 2
    unpacker = Unpacker()
    found = [
        message
        for start in range(0, len(data), size)
        for message in unpacker.push(data[start : start + size])
    ]
    assert found == [[[1, value]]] * 2


def test_errors_come_as_they_were() -> None:
    error = FormatError("is damaged", path="a.gguf", tensor="t")
    (found,) = next(Unpacker().push(pack([error])))
    assert type(found) is FormatError
    assert str(found) == str(error)
    assert (found.path, found.tensor) == (Path("a.gguf"), "t")
