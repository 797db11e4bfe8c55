"""`/v1/chat/completions`: messages, formats, tools."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, StrictInt, field_validator, model_validator

from edgemerge.runtime.engine.messages import Chat, Ended, Generation, Piece
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.events import Answer, Documents, answer_all, head, stream, usage
from edgemerge.runtime.serve.formats import ResponseFormat, format_grammar
from edgemerge.runtime.serve.models import ModelFile
from edgemerge.runtime.serve.requests import CHAT, MAX_ALTERNATIVES, Generating, read_json
from edgemerge.runtime.serve.routes import Routes
from edgemerge.runtime.serve.scores import write_chat_logprobs
from edgemerge.runtime.serve.tools import (
    Tool,
    ToolChoice,
    find_calls,
    may_be_call,
    tell_tools,
    tool_grammar,
)
from edgemerge.runtime.serve.turns import Turn, Turns

__all__ = ["ChatRequest", "Message", "add_chat", "chat_generations", "chat_grammar"]

_MAX_TOOLS = 128


class _Called(BaseModel):
    name: str
    arguments: str | dict[str, Any] = ""


class _Call(BaseModel):
    id: str = ""
    type: Literal["function"] = "function"
    function: _Called


class Message(BaseModel):
    """One message; a developer's is a system's, and parts become one text."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str = ""
    name: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _join(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return "" if content is None else content
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if any(not isinstance(text, str) for text in texts):
            raise ValueError("this server takes text, no images or sounds")
        return "".join(map(str, texts))

    def for_template(self) -> dict[str, Any]:
        """Give what a chat template finds: arguments of calls are no text there, as in transformers."""
        found = self.model_dump(exclude_none=True)
        if self.role == "developer":
            found["role"] = "system"
        for call in found.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            if isinstance(arguments, str):
                try:
                    call["function"]["arguments"] = read_json(arguments or "{}")
                except ValueError:
                    continue
        return found


class ChatRequest(Generating):
    """OpenAI's request."""

    refused: ClassVar[dict[str, str]] = {
        **Generating.refused,
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "this server takes and gives text",
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=_MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: ToolChoice = "auto"

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.max_tokens is None:
            self.max_tokens = self.max_completion_tokens
        if self.tool_choice == "none" or not self.tools:
            self.tools = []
        return self

    @property
    def n_alternatives(self) -> int | None:
        """Alternatives whose scores are wanted; None for no scores."""
        if not self.logprobs and self.top_logprobs is None:
            return None
        return self.top_logprobs or 0

    @property
    def tool_names(self) -> set[str]:
        """Names of the functions that may be called."""
        return {tool.function.name for tool in self.tools}


async def chat_grammar(body: ChatRequest, file: ModelFile) -> str:
    """GBNF that the answer has to follow, if any.

    Raises
    ------
    Refusal
        400: as of `format_grammar`, `tool_grammar`.
    """

    def make() -> str:
        template = file.tokenizer.get("chat_template") or ""
        if body.tools and (forced := tool_grammar(body.tools, body.tool_choice, template)):
            return forced
        return format_grammar(body.response_format)

    if body.tools or body.response_format is not None:
        return await asyncio.to_thread(make)  # the first one loads llama.cpp
    return ""


def chat_generations(body: ChatRequest, turn: Turn, limit: int, grammar: str) -> list[Generation]:
    """Say what is to be computed: n answers.

    Raises
    ------
    Refusal
        400: the model has no chat template.
    """
    if not turn.loaded.facts.has_template:
        raise Refusal(400, "this model has no chat template: use /v1/completions")
    messages = [message.for_template() for message in body.messages]
    names: dict[str, Any] = {}
    template = turn.loaded.file.tokenizer.get("chat_template") or ""
    if body.tools and "tools" in template:
        names["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
    elif body.tools:
        _add_to_system(messages, tell_tools(body.tools))
    return [
        Generation(
            prompt=Chat(messages, names),
            max_tokens=limit,
            sampling=sampling,
            stops=tuple(body.stop),
            n_alternatives=body.n_alternatives,
        )
        for sampling in body.sampling(turn.loaded.facts.n_vocab, grammar=grammar)
    ]


def _add_to_system(messages: list[dict[str, Any]], text: str) -> None:
    if messages[0]["role"] == "system":
        messages[0]["content"] = f"{messages[0]['content']}\n\n{text}".lstrip()
    else:
        messages.insert(0, {"role": "system", "content": text})


def add_chat(routes: Routes, turns: Turns) -> None:
    """Add the route."""

    @routes.post(CHAT, ChatRequest)
    async def create_chat_completion(body: ChatRequest) -> Any:
        grammar = await chat_grammar(body, turns.models.resolve(body.model))
        if body.stream:
            return await stream(_stream(turns, body, grammar))
        async with turns.turn(body) as turn:
            limit = turns.limits.tokens(body.max_tokens)
            answers = await answer_all(turn, chat_generations(body, turn, limit, grammar))
            return {
                **head("chat.completion", "chatcmpl", turn),
                "choices": [_choice(body, answer, i) for i, answer in enumerate(answers)],
                "usage": usage(answers, turn, body.n),
            }


def _choice(body: ChatRequest, answer: Answer, i: int) -> dict[str, Any]:
    text, calls = find_calls(answer.text, body.tool_names) if body.tools else (answer.text, [])
    message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text}
    if calls:
        message["tool_calls"] = calls
    scored = body.n_alternatives is not None
    return {
        "index": i,
        "message": message,
        "logprobs": write_chat_logprobs(answer.scores) if scored else None,
        "finish_reason": "tool_calls" if calls else answer.reason,
    }


async def _stream(turns: Turns, body: ChatRequest, grammar: str) -> Documents:
    async with turns.turn(body) as turn:
        limit = turns.limits.tokens(body.max_tokens)
        wanted = chat_generations(body, turn, limit, grammar)
        answers = [Answer() for _ in wanted]
        kept = [Answer() for _ in wanted]  # what may become a call is not said yet
        is_begun = [False] * len(wanted)  # whether some of it was said
        names = body.tool_names
        start = head("chat.completion.chunk", "chatcmpl", turn)
        if body.stream_options.include_usage:
            start["usage"] = None

        def chunk(i: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
            choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": None, **more}
            return {**start, "choices": [choice]}

        def said(i: int, text: str) -> dict[str, Any]:
            scores = kept[i].scores
            logprobs = write_chat_logprobs(scores) if scores else None
            return chunk(i, {"content": text}, logprobs=logprobs)

        async with aclosing(turn.answer(wanted)) as events:
            async for i, event in events:
                if not answers[i].n_prompt and not isinstance(event, Ended):
                    yield chunk(i, {"role": "assistant", "content": ""})
                if isinstance(event, Piece):
                    kept[i].add(event)
                    if names and may_be_call(kept[i].text, names, is_begun=is_begun[i]):
                        continue
                    yield said(i, kept[i].text)
                    kept[i], is_begun[i] = Answer(), True
                    continue
                answers[i].add(event)
                if isinstance(event, Ended):
                    text, calls = find_calls(kept[i].text, names, is_begun=is_begun[i])
                    if text:
                        yield said(i, text)
                    if calls:
                        numbered = [{"index": k, **call} for k, call in enumerate(calls)]
                        yield chunk(i, {"tool_calls": numbered})
                    yield chunk(i, {}, finish_reason="tool_calls" if calls else answers[i].reason)
        counted = usage(answers, turn, body.n)
        if body.stream_options.include_usage:
            yield {**start, "choices": [], "usage": counted}
    yield "[DONE]"
