"""`/v1/completions` with all that OpenAI's takes as a prompt: text, tokens, and several of either."""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated, Any, ClassVar

from pydantic import Field, StrictInt, model_validator

from edgemerge.runtime.engine.messages import Ended, Generation, Piece, TokenScore
from edgemerge.runtime.serve.events import Answer, Documents, answer_all, head, stream, usage
from edgemerge.runtime.serve.options import Limits
from edgemerge.runtime.serve.requests import (
    COMPLETIONS,
    MAX_ALTERNATIVES,
    Generating,
    Inputs,
    split_inputs,
)
from edgemerge.runtime.serve.routes import Routes
from edgemerge.runtime.serve.scores import write_logprobs
from edgemerge.runtime.serve.turns import Turn, Turns

__all__ = ["CompletionRequest", "add_completions"]

_MAX_PROMPTS = 256


class CompletionRequest(Generating):
    """OpenAI's request."""

    refused: ClassVar[dict[str, str]] = {
        **Generating.refused,
        "suffix": "this server does not fill in the middle of a text",
    }

    nullable: ClassVar[frozenset[str]] = frozenset({"max_tokens"})  # as many as the server gives

    prompt: Inputs = ""
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = 16
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    echo: bool = False
    best_of: StrictInt | None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: this server does not choose between answers; see n")
        if self.stream and self.echo:
            raise ValueError("echo: cannot be streamed; leave out stream")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 makes sense with echo only")
        if not 0 < len(self.prompts) <= _MAX_PROMPTS:
            raise ValueError(f"prompt: 1 to {_MAX_PROMPTS} at a time")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Single prompts."""
        return split_inputs(self.prompt)


def add_completions(routes: Routes, turns: Turns) -> None:
    """Add the route."""

    @routes.post(COMPLETIONS, CompletionRequest)
    async def create_completions(body: CompletionRequest) -> Any:
        if body.stream:
            return await stream(_stream(turns, body))
        async with turns.turn(body) as turn:
            answers = await answer_all(turn, _wanted(body, turn, turns.limits))
            said = [await _text_of(turn, prompt) for prompt in body.prompts]
            choices = [
                _choice(body, answer, i, said[i // body.n]) for i, answer in enumerate(answers)
            ]
            return {
                **head("text_completion", "cmpl", turn),
                "choices": choices,
                "usage": usage(answers, turn, body.n),
            }


def _wanted(body: CompletionRequest, turn: Turn, limits: Limits) -> list[Generation]:
    """Say what is to be computed: n answers for each prompt."""
    return [
        Generation(
            prompt=prompt,
            max_tokens=limits.tokens(body.max_tokens),
            sampling=sampling,
            stops=tuple(body.stop),
            n_alternatives=body.logprobs,
            scores_prompt=body.echo and body.logprobs is not None,
        )
        for prompt in body.prompts
        for sampling in body.sampling(turn.loaded.facts.n_vocab)
    ]


async def _text_of(turn: Turn, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else await turn.loaded.process.detokenize(prompt)


def _choice(body: CompletionRequest, answer: Answer, i: int, said: str) -> dict[str, Any]:
    """One answer; `said` is the prompt's text."""
    logprobs = None
    if body.logprobs is not None:
        fresh = answer.scores
        if body.echo and not fresh and answer.end is not None and answer.end.end_score is not None:
            # lm-evaluation-harness takes the last token of all for the answer's, even if it ends
            fresh = [answer.end.end_score]
        scores = [*answer.prompt_scores, *fresh]
        logprobs = _logprobs(body, scores, 0 if body.echo else len(said))
    return {
        "text": said + answer.text if body.echo else answer.text,
        "index": i,
        "logprobs": logprobs,
        "finish_reason": answer.reason,
    }


def _logprobs(body: CompletionRequest, scores: list[TokenScore], offset: int) -> dict[str, Any]:
    return write_logprobs(scores, offset, alternatives=bool(body.logprobs))


async def _stream(turns: Turns, body: CompletionRequest) -> Documents:
    async with turns.turn(body) as turn:
        wanted = _wanted(body, turn, turns.limits)
        answers = [Answer() for _ in wanted]
        start = head("text_completion", "cmpl", turn)
        if body.stream_options.include_usage:
            start["usage"] = None
        offsets: dict[int, int] = {}
        if body.logprobs is not None:
            texts = [await _text_of(turn, prompt) for prompt in body.prompts]
            offsets = {i: len(texts[i // body.n]) for i in range(len(answers))}

        def choice(i: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
            names = {"text": text, "index": i, "logprobs": logprobs, "finish_reason": reason}
            return {**start, "choices": [names]}

        async with aclosing(turn.answer(wanted)) as events:
            async for i, event in events:
                if isinstance(event, Piece):  # said, and not kept
                    logprobs = None
                    if event.scores:
                        logprobs = _logprobs(body, event.scores, offsets[i])
                        offsets[i] += len(event.text)
                    yield choice(i, event.text, logprobs, None)
                    continue
                answers[i].add(event)
                if isinstance(event, Ended):
                    yield choice(i, "", None, answers[i].reason)
        counted = usage(answers, turn, body.n)
        if body.stream_options.include_usage:
            yield {**start, "choices": [], "usage": counted}
    yield "[DONE]"
