"""`/v1/completions` with all that OpenAI's takes as a prompt: text, tokens, and several of either."""

from __future__ import annotations

from typing import Any

import llama_cpp.server.app as llama_app
from fastapi import APIRouter, Request
from llama_cpp.server.types import CreateCompletionRequest

from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.requests import COMPLETIONS

__all__ = ["add_completions"]

Prompt = str | list[int]


class CompletionRequest(CreateCompletionRequest):  # type: ignore[misc]
    """llama-cpp-python's request, which takes texts only."""

    prompt: str | list[int] | list[str] | list[list[int]] = ""


def add_completions(router: APIRouter) -> None:
    """Add the route; it calls llama-cpp-python's for each prompt."""

    @router.post(COMPLETIONS)
    async def create_completions(request: Request, body: CompletionRequest) -> Any:
        prompts = _split(body.prompt)
        if body.stream and len(prompts) > 1:
            raise Refusal(400, "prompt: only one can be streamed; leave out stream")
        # Their route takes the first of a list, so that a list of one is any kind of prompt.
        answers = [
            await llama_app.create_completion(request, body.model_copy(update={"prompt": [prompt]}))
            for prompt in prompts
        ]
        return answers[0] if len(answers) == 1 else _combine(answers)


def _split(prompt: str | list[int] | list[str] | list[list[int]]) -> list[Prompt]:
    """Cut a request's prompt into single ones."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise Refusal(400, "prompt: there is none")
    if all(isinstance(item, int) for item in prompt):
        return [[item for item in prompt if isinstance(item, int)]]
    return [item for item in prompt if not isinstance(item, int)]


def _combine(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer with a choice per prompt."""
    choices = [{**answer["choices"][0], "index": i} for i, answer in enumerate(answers)]
    usage = {name: sum(a["usage"][name] for a in answers) for name in answers[0]["usage"]}
    return {**answers[0], "choices": choices, "usage": usage}
