from __future__ import annotations

import json
from typing import Any

import pytest

from edgemerge.runtime.serve.errors import Refusal, explain
from edgemerge.runtime.serve.gate import Access
from edgemerge.runtime.serve.requests import CHAT, COMPLETIONS, Limits, check_request

LIMITS = Limits(max_tokens=100)
MESSAGES = [{"role": "user", "content": "hello"}]


def checked(path: str, **request: Any) -> dict[str, Any]:
    return check_request(path, json.dumps(request).encode(), LIMITS)


def test_answers_are_bounded() -> None:
    assert checked(COMPLETIONS, prompt="x", max_tokens=5000)["max_tokens"] == 100
    assert checked(COMPLETIONS, prompt="x", max_tokens=5)["max_tokens"] == 5
    assert checked(COMPLETIONS, prompt="x", max_tokens=None)["max_tokens"] == 100
    assert "max_tokens" not in checked(COMPLETIONS, prompt="x")  # OpenAI's default is 16
    assert checked(CHAT, messages=MESSAGES)["max_tokens"] == 100
    assert checked(CHAT, messages=MESSAGES, max_completion_tokens=7)["max_tokens"] == 7
    assert checked(CHAT, messages=MESSAGES, max_completion_tokens=700)["max_tokens"] == 100


def test_logprobs_of_a_chat_need_no_number() -> None:
    assert checked(CHAT, messages=MESSAGES, logprobs=True)["top_logprobs"] == 0
    assert "top_logprobs" not in checked(CHAT, messages=MESSAGES)


def test_null_is_what_the_client_leaves_open() -> None:
    open_ = {"presence_penalty": None, "stop": None, "model": None}
    assert checked(COMPLETIONS, prompt="x", **open_) == checked(COMPLETIONS, prompt="x")


def test_a_message_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    found = checked(CHAT, messages=messages)["messages"]
    assert [message["content"] for message in found] == ["Good day", ""]


def tool(schema: object) -> dict[str, Any]:
    function = {"name": "f", "parameters": schema}
    choice = {"type": "function", "function": {"name": "f"}}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": choice}


@pytest.mark.parametrize(
    ("path", "request_", "message"),
    [
        (COMPLETIONS, {"prompt": "x", "n": 2}, "n: "),
        (COMPLETIONS, {"prompt": "x", "best_of": 3}, "best_of: "),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix: "),
        (COMPLETIONS, {"prompt": "x", "echo": True, "stream": True}, "echo: "),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens: 0"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 5.0}, "max_tokens: must be a whole"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 21}, "logprobs: at most 20"),
        (COMPLETIONS, {"prompt": "x", "stop": ["a"] * 17}, "stop: at most 16"),
        (COMPLETIONS, {"prompt": "x", "stop": ["a", ""]}, "stop: an empty"),
        (COMPLETIONS, {"prompt": "x", "grammar": 'root ::= "a"'}, "grammar: "),
        (CHAT, {"messages": []}, "messages: "),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "no images",
        ),
        (CHAT, {"messages": MESSAGES, "max_tokens": 0}, "max_tokens: must be 1"),
        (CHAT, {"messages": MESSAGES, **tool({"pattern": "^(a?a?)*$"})}, "pattern: "),
        (CHAT, {"messages": MESSAGES, **tool({"$ref": "http://10.0.0.1/"})}, r"\$ref: "),
        (CHAT, {"messages": MESSAGES, **tool({"maxItems": 10**9})}, "maxItems: at most"),
        (CHAT, {"messages": MESSAGES, **tool({"enum": ["x"] * 600})}, "more than 500"),
        (
            CHAT,
            {"messages": MESSAGES, "response_format": {"schema": {"pattern": "^a$"}}},
            "pattern: ",
        ),
    ],
)
def test_what_it_does_not_do_is_said(path: str, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message) as caught:
        checked(path, **request_)
    assert caught.value.status == 400


def test_tools_that_no_answer_is_held_to_may_be_any() -> None:
    request = {"messages": MESSAGES, **tool({"pattern": "^a$"})}
    request["tool_choice"] = "auto"
    assert checked(CHAT, **request)["tools"] == request["tools"]


@pytest.mark.parametrize(
    ("status", "retry_after", "headers"),
    [
        (429, 3, {"retry-after": "3"}),
        (504, None, {"x-should-retry": "false"}),
        (401, None, {"www-authenticate": "Bearer"}),
    ],
)
def test_headers_tell_whether_to_try_again(
    status: int, retry_after: int | None, headers: dict[str, str]
) -> None:
    refusal = Refusal(status, "no", retry_after=retry_after)
    assert refusal.headers.items() >= headers.items()
    assert ("x-should-retry" in refusal.headers) == (retry_after is None)


def test_what_the_client_must_not_see_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    refusal = explain(RuntimeError("/srv/secret.gguf is broken"))
    assert refusal.status == 500
    assert "secret" not in json.dumps(refusal.content)
    assert "secret" in caplog.text
    assert len(json.dumps(explain(ValueError("x" * 10_000)).content)) < 1000


def let_in(access: Access, path: str = "/v1/models", **headers: str) -> int:
    try:
        access.check(path, {"host": "localhost:8080", **headers})
    except Refusal as refusal:
        return refusal.status
    return 200


def test_the_key() -> None:
    access = Access("s3cret")
    assert let_in(access) == 401
    assert let_in(access, authorization="Bearer s3cret") == 200
    assert let_in(access, authorization="bearer s3cret") == 200
    for wrong in ("s3cret", "Basic s3cret", "Bearer ", "Bearer s3cre", "Bearer \xfc"):
        assert let_in(access, authorization=wrong) == 401
    for path in ("/", "/health", "/static/app.js"):
        assert let_in(access, path) == 200
    assert let_in(access, "/metrics") == 401
    assert let_in(Access("s3cret", open_metrics=True), "/metrics") == 200
    assert let_in(Access(None)) == 200


def test_a_name_that_leads_here_is_no_way_in() -> None:
    access = Access(None, frozenset({"localhost", "127.0.0.1", "::1", "ward.example"}))
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080", "ward.example"):
        assert let_in(access, host=host) == 200
    for host in ("", "evil.example", "localhost.evil.example", "[::1", "127.0.0.1.nip.io"):
        assert let_in(access, host=host) == 403
    assert let_in(Access("key"), "/health", host="anything") == 200


def test_pages_of_other_sites_are_kept_out() -> None:
    access = Access(None)
    assert let_in(access, origin="http://localhost:8080") == 200
    for origin in ("null", "", "https://evil.example", "http://localhost:8081", "http://["):
        assert let_in(access, origin=origin) == 403
