"""vLLM's routes for tokens: lm-evaluation-harness finds the tokenizer there, without transformers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StrictInt
from starlette.requests import Request

from edgemerge.runtime.serve.requests import Body
from edgemerge.runtime.serve.routes import Routes
from edgemerge.runtime.serve.turns import Turns

__all__ = ["add_tokens"]

_MAX_TOKENS = 1 << 20


class TokenizeRequest(Body):
    """A text."""

    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    """Its tokens."""

    tokens: Annotated[list[StrictInt], Field(max_length=_MAX_TOKENS)]


def add_tokens(routes: Routes, turns: Turns) -> None:
    """Add the routes."""

    @routes.post("/tokenize", TokenizeRequest)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        async with turns.turn(body) as turn:
            add_special = body.add_special_tokens
            tokens = await turn.loaded.process.tokenize(body.prompt, add_special=add_special)
            n_ctx = turn.loaded.facts.n_ctx
            return {"tokens": tokens, "count": len(tokens), "max_model_len": n_ctx}

    @routes.post("/detokenize", DetokenizeRequest)
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        async with turns.turn(body) as turn:
            return {"prompt": await turn.loaded.process.detokenize(body.tokens)}

    @routes.get("/tokenizer_info")
    async def tokenizer_info(_request: Request) -> dict[str, Any]:
        return {**turns.models.resolve(None).tokenizer}
