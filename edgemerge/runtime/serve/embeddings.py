"""`/v1/embeddings` and `/v1/rerank`."""

from __future__ import annotations

import base64
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field, StrictInt

from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.requests import EMBEDDINGS, RERANK, Body, Inputs, split_inputs
from edgemerge.runtime.serve.routes import Routes
from edgemerge.runtime.serve.turns import Turns

__all__ = ["add_embeddings"]

_MAX_INPUTS = 2048  # as OpenAI's


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
            data = [
                {"object": "embedding", "embedding": _write(vector, body), "index": i}
                for i, vector in enumerate(vectors)
            ]
            used = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
            name = turn.loaded.file.name
            return {"object": "list", "data": data, "model": name, "usage": used}

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


def _write(vector: Any, body: EmbeddingRequest) -> list[float] | str:
    if body.encoding_format == "base64":
        return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
    return [float(value) for value in vector]
