"""`/v1/embeddings` and `/v1/rerank`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, StrictInt
from starlette.responses import StreamingResponse

from edgemerge.runtime.engine.vectors import read_vector
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.requests import EMBEDDINGS, RERANK, Body, Inputs, split_inputs
from edgemerge.runtime.serve.routes import Routes
from edgemerge.runtime.serve.turns import Turns

__all__ = ["add_embeddings", "answer_in_pieces"]

_MAX_INPUTS = 2048  # as OpenAI's
_PIECE = 1 << 16  # characters of base64 whose numbers are written at a time: some milliseconds


class EmbeddingRequest(Body):
    """OpenAI's request."""

    refused: ClassVar[dict[str, str]] = {"dimensions": "vectors have the model's own length"}

    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"

    @property
    def inputs(self) -> list[str | list[int]]:
        """Single texts."""
        return split_inputs(self.input)


class _Document(BaseModel):
    text: str


class RerankRequest(Body):
    """Jina's and Cohere's request."""

    query: str
    documents: Annotated[list[str | _Document], Field(min_length=1, max_length=_MAX_INPUTS)]
    top_n: Annotated[StrictInt, Field(ge=1)] | None = None
    return_documents: bool = False


def add_embeddings(routes: Routes, turns: Turns) -> None:
    """Add the routes."""

    @routes.post(EMBEDDINGS, EmbeddingRequest)
    async def create_embeddings(body: EmbeddingRequest) -> Any:
        if not 0 < len(body.inputs) <= _MAX_INPUTS:
            raise Refusal(400, f"input: 1 to {_MAX_INPUTS} texts")
        async with turns.turn(body) as turn:
            vectors, n_tokens = await turn.loaded.process.embed(body.inputs)
            turn.run.prompt_tokens += n_tokens
            used = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
            names = {"object": "list", "model": turn.loaded.file.name, "usage": used}
            return answer_in_pieces(names, vectors, body.encoding_format)

    @routes.post(RERANK, RerankRequest)
    async def rerank(body: RerankRequest) -> Any:
        texts = [item if isinstance(item, str) else item.text for item in body.documents]
        async with turns.turn(body) as turn:
            if not turn.loaded.facts.can_rerank:
                raise Refusal(400, "this model does not order texts: give one with a rank pooling")
            scores, n_tokens = await turn.loaded.process.rerank(body.query, texts)
            turn.run.prompt_tokens += n_tokens
            order = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n]
            results = [
                {"index": i, "relevance_score": float(scores[i])}
                | ({"document": {"text": texts[i]}} if body.return_documents else {})
                for i in order
            ]
            used = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
            name = turn.loaded.file.name
            return {"object": "list", "model": name, "results": results, "usage": used}


def answer_in_pieces(names: dict[str, Any], vectors: Sequence[str], form: str) -> StreamingResponse:
    """Answer piece by piece, each written in a thread: whole, thousands of vectors would hold the server up.

    Parameters
    ----------
    names : dict
        What the answer has beside its `data`.
    vectors : sequence of str
        As of `ModelProcess.embed`.
    form : str
        float or base64.
    """
    return StreamingResponse(_pieces(names, vectors, form), media_type="application/json")


def _pieces(names: dict[str, Any], vectors: Sequence[str], form: str) -> Iterator[bytes]:
    start = json.dumps(names).removesuffix("}") + ', "data": ['
    piece, size = [start], 0
    for i, vector in enumerate(vectors):
        written = f'"{vector}"' if form == "base64" else _write_numbers(vector)
        comma = ", " if i else ""
        piece.append(f'{comma}{{"object": "embedding", "index": {i}, "embedding": {written}}}')
        size += len(vector)
        if size > _PIECE:
            yield "".join(piece).encode()
            piece, size = [], 0
    yield "".join([*piece, "]}"]).encode()


def _write_numbers(vector: str) -> str:
    """Write numbers with nine digits, which tell float32 apart."""
    values = read_vector(vector).tolist()
    return f"[{', '.join(['%.9g'] * len(values))}]" % tuple(values)
