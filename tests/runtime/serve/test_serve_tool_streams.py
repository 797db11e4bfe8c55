"""Calls of tools in a stream: what is kept back, and that it comes to what the whole answer says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from edgemerge.runtime.engine.messages import Begun, Ended, Generation, Piece
from edgemerge.runtime.serve.chat import ChatRequest, add_chat
from edgemerge.runtime.serve.options import Limits
from edgemerge.runtime.serve.routes import Routes
from edgemerge.runtime.serve.tools import may_be_call
from edgemerge.runtime.serve.turns import Turn
from tests.support.fake_process import FakeProcess, make_turn

CALL = '{"name": "look_up", "arguments": {"word": "moth"}}'
REQUEST = {
    "messages": [{"role": "user", "content": "What is a moth?"}],
    "tools": [{"type": "function", "function": {"name": "look_up"}}],
}


class Writer(FakeProcess):
    """Writes the pieces that a test says."""

    def __init__(self, pieces: list[str]) -> None:
        super().__init__("a")
        self._pieces = pieces

    async def generate(self, _: Generation) -> AsyncGenerator[Any, None]:
        yield Begun(1, 0)
        for piece in self._pieces:
            yield Piece(piece, 1)
        yield Ended("stop", len(self._pieces))


class OneTurn:
    """Gives one turn to every request."""

    limits = Limits()

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.models = self

    def resolve(self, _: str | None) -> Any:
        return self._turn.loaded.file

    @asynccontextmanager
    async def turn(self, _: ChatRequest) -> AsyncIterator[Turn]:
        yield self._turn


class Caught(Routes):
    """Keeps the function of a route, for a call without HTTP."""

    answer: Any

    def post(self, *_: Any) -> Any:
        return lambda answer: setattr(self, "answer", answer)


async def make_route(pieces: list[str]) -> Any:
    routes = Caught()
    turn, _ = await make_turn(Writer(pieces), 1)
    add_chat(routes, OneTurn(turn))  # type: ignore[arg-type]
    return routes.answer


async def ask(pieces: list[str]) -> tuple[str, list[str], str]:
    """Get an answer at once: its text, the arguments of its calls, and why it ended."""
    answer = await make_route(pieces)
    (choice,) = (await answer(ChatRequest.model_validate(REQUEST)))["choices"]
    calls = choice["message"].get("tool_calls", ())
    arguments = [call["function"]["arguments"] for call in calls]
    return choice["message"]["content"] or "", arguments, choice["finish_reason"]


async def ask_streamed(pieces: list[str]) -> tuple[list[str], list[str], str]:
    """Get the same as a stream: its texts, one by one."""
    answer = await make_route(pieces)
    stream = await answer(ChatRequest.model_validate({**REQUEST, "stream": True}))
    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b"").decode())

    await stream({}, None, send)
    *events, _ = "".join(sent).removesuffix("\n\n").split("\n\n")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    deltas = [choice["delta"] for choice in choices]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    texts = [delta["content"] for delta in deltas if delta.get("content")]
    arguments = [call["function"]["arguments"] for call in calls]
    return texts, arguments, choices[-1]["finish_reason"]


@pytest.mark.parametrize(
    "text",
    [
        f"Example: {CALL}",
        f"It is [1] {CALL}",
        f"See:\n```json\n{CALL}\n```",
        f"5 {CALL}",
        f"```python\n{CALL}\n```",
        f"look at {CALL}",
        CALL,
        f" \n{CALL}",
        f"```json\n{CALL}\n```",
        f"[{CALL}, {CALL}]",
        f"[TOOL_CALLS] [{CALL}]",
        'look_up[ARGS] {"word": "moth"}',
        'look_up{"word": "moth"}',
        f"I look now. <tool_call>{CALL}</tool_call>",
        f"I <b>look</b> <tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>",
        "<tool_call>",
        "A moth. ",
        " ",
    ],
)
@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_stream_has_the_text_and_the_calls_of_the_whole_answer(text: str, size: int) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    said, calls, reason = asyncio.run(ask(pieces))
    texts, streamed_calls, streamed_reason = asyncio.run(ask_streamed(pieces))
    assert (streamed_calls, streamed_reason) == (calls, reason)
    streamed = "".join(texts)
    assert (streamed.rstrip() if calls else streamed) == said


@pytest.mark.parametrize(
    "pieces",
    [
        ["A", " list", ": ", "[", "1", "]", "."],
        ["See", ":", "\n", "```", "python", "\n", "x"],
        ["[1]", " see", " there"],
        ["```", "python", "\n", "x"],
    ],
)
def test_a_stream_does_not_wait_where_no_call_can_come(pieces: list[str]) -> None:
    texts, calls, _ = asyncio.run(ask_streamed(pieces))
    assert "".join(texts) == "".join(pieces)
    assert (texts[-2:], calls) == (pieces[-2:], [])


@pytest.mark.parametrize(
    "text",
    ["", " ", "<", "<tool", "<tool_call>{", '{"name', "[TOOL", "[ {", "```js", "```json [", "look_",
     "look_up [AR", 'look_up[ARGS] {"', "<|python_tag|>", "I look. <tool_c"],
)  # fmt: skip
def test_a_stream_keeps_back_what_may_become_a_call(text: str) -> None:
    assert may_be_call(text, {"look_up"}, is_begun=False)
    is_open = "<" in text and "<|" not in text
    assert may_be_call(text, {"look_up"}, is_begun=True) == is_open


@pytest.mark.parametrize("text", ["I", "I look.", "<b>", "[1] see", "```python\n", "look ", "{5"])
def test_a_stream_tells_what_cannot_become_a_call(text: str) -> None:
    assert not may_be_call(text, {"look_up"}, is_begun=False)
