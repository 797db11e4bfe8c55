"""How embeddings are written for a client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import numpy as np
import pytest

from edgemerge.runtime.engine.vectors import read_vector, write_vector
from edgemerge.runtime.serve.embeddings import answer_in_pieces


def written(vectors: list[str], form: str) -> list[bytes]:
    """The pieces of an answer."""
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError("nothing else is wanted of the client")

    names = {"object": "list", "model": "a", "usage": {"total_tokens": 3}}
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
    asyncio.run(answer_in_pieces(names, vectors, form)(scope, receive, send))
    head, *pieces = sent
    assert head["status"] == 200
    assert (b"content-type", b"application/json") in head["headers"]
    assert [piece["more_body"] for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    return [piece["body"] for piece in pieces]


@pytest.mark.parametrize("form", ["float", "base64"])
@pytest.mark.parametrize("n", [1, 300])
def test_vectors_are_written_in_small_pieces(n: int, form: str) -> None:
    """Fault: all were one text of JSON, which nothing else of the server ran beside."""
    values = np.random.default_rng(0).standard_normal((n, 512)).astype(np.float32)
    values[0, :4] = [0.0, -1e-38, 1.0, 3e-5]
    pieces = written([write_vector(row) for row in values], form)
    assert max(map(len, pieces)) < 400_000
    document = json.loads(b"".join(pieces))
    rows = [item.pop("embedding") for item in document["data"]]
    assert document == {
        "object": "list",
        "data": [{"object": "embedding", "index": i} for i in range(n)],
        "model": "a",
        "usage": {"total_tokens": 3},
    }
    if form == "base64":
        rows = [read_vector(row) for row in rows]
    assert np.array_equal(np.array(rows, np.float32), values)
