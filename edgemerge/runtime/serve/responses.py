"""`/v1/responses` for text: OpenAI's newer interface, without anything that is kept between requests."""

from __future__ import annotations

import time
import uuid
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, StrictInt, ValidationError

from edgemerge.runtime.engine.messages import Piece
from edgemerge.runtime.serve.chat import ChatRequest, Message, chat_generations, chat_grammar
from edgemerge.runtime.serve.errors import Refusal, wrong_field
from edgemerge.runtime.serve.events import Answer, Documents, answer_all, stream, usage
from edgemerge.runtime.serve.requests import RESPONSES, Generating
from edgemerge.runtime.serve.routes import Routes
from edgemerge.runtime.serve.turns import Turn, Turns

__all__ = ["add_responses"]


class _Item(Message):
    type: Literal["message"] = "message"


class _Text(BaseModel):
    format: dict[str, Any] | None = None


class ResponsesRequest(Generating):
    """OpenAI's request."""

    refused: ClassVar[dict[str, str]] = {
        **Generating.refused,
        "previous_response_id": "this server keeps no answers; send the conversation",
        "conversation": "this server keeps no answers; send the conversation",
        "background": "this server answers at once",
        "tools": "use /v1/chat/completions",
    }

    input: str | Annotated[list[_Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    text: _Text = _Text()

    def as_chat(self) -> ChatRequest:
        """Say the same as a chat.

        Raises
        ------
        Refusal
            400: `text.format` is no format.
        """
        messages: list[Any] = [{"role": "system", "content": self.instructions or ""}]
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            messages += [item.model_dump(exclude={"type"}) for item in self.input]
        form = self.text.format
        if form is not None and form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": form}
        names = set(Generating.model_fields) - {"n"}  # a response is one answer
        fields = self.model_dump(include=names, exclude_unset=True)
        document = {
            **fields,
            "messages": messages if self.instructions else messages[1:],
            "max_tokens": self.max_output_tokens,
            "response_format": form,
        }
        try:
            return ChatRequest.model_validate(document)
        except ValidationError as error:  # the format alone was not checked before
            problems = [
                {**one, "loc": ("text", "format", *one["loc"][3:])} for one in error.errors()
            ]
            raise Refusal(400, wrong_field(problems)) from None


def add_responses(routes: Routes, turns: Turns) -> None:
    """Add the route."""

    @routes.post(RESPONSES, ResponsesRequest)
    async def create_response(body: ResponsesRequest) -> Any:
        chat = body.as_chat()
        grammar = await chat_grammar(chat, turns.models.resolve(body.model))
        if body.stream:
            return await stream(_stream(turns, body, chat, grammar))
        async with turns.turn(body) as turn:
            limit = turns.limits.tokens(chat.max_tokens)
            (answer,) = await answer_all(turn, chat_generations(chat, turn, limit, grammar))
            return _finish(_begin(body, turn), _message("completed", answer.text), answer, turn)


async def _stream(
    turns: Turns, body: ResponsesRequest, chat: ChatRequest, grammar: str
) -> Documents:
    async with turns.turn(body) as turn:
        limit = turns.limits.tokens(chat.max_tokens)
        wanted = chat_generations(chat, turn, limit, grammar)
        answer = Answer()
        response, item = _begin(body, turn), _message("in_progress", "")
        number = iter(range(1 << 30))
        place = {"item_id": item["id"], "output_index": 0, "content_index": 0}

        def event(kind: str, **names: Any) -> dict[str, Any]:
            return {"type": f"response.{kind}", "sequence_number": next(number), **names}

        is_begun = False
        async with aclosing(turn.answer(wanted)) as events:
            async for _, came in events:
                if not is_begun:
                    is_begun = True
                    yield event("created", response=response)
                    yield event("in_progress", response=response)
                    empty = {**item, "content": []}
                    yield event("output_item.added", output_index=0, item=empty)
                    yield event("content_part.added", **place, part=_part(""))
                answer.add(came)
                if isinstance(came, Piece):
                    yield event("output_text.delta", **place, delta=came.text, logprobs=[])
        whole = {**_message("completed", answer.text), "id": item["id"]}
        finished = _finish(response, whole, answer, turn)
        yield event("output_text.done", **place, text=answer.text, logprobs=[])
        yield event("content_part.done", **place, part=_part(answer.text))
        yield event("output_item.done", output_index=0, item=whole)
        kind = "completed" if finished["status"] == "completed" else "incomplete"
        yield event(kind, response=finished)


def _begin(body: ResponsesRequest, turn: Turn) -> dict[str, Any]:
    """Make a response of which nothing is written yet."""
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": turn.loaded.file.name,
        "system_fingerprint": turn.loaded.facts.fingerprint,
        "output": [],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "temperature": body.temperature,
        "text": {"format": body.text.format or {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_p": body.top_p,
        "usage": None,
        "metadata": {},
    }


def _finish(
    response: dict[str, Any], item: dict[str, Any], answer: Answer, turn: Turn
) -> dict[str, Any]:
    is_whole = answer.reason == "stop"
    counted = usage([answer], turn)
    return {
        **response,
        "status": "completed" if is_whole else "incomplete",
        "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
        "output": [item],
        "usage": {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": answer.n_reused},
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counted["total_tokens"],
        },
    }


def _message(status: str, text: str) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [_part(text)],
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
