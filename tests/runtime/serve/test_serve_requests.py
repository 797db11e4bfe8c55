from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import ValidationError

from edgemerge.runtime.engine.process import EngineFailure
from edgemerge.runtime.serve.chat import ChatRequest
from edgemerge.runtime.serve.completions import CompletionRequest
from edgemerge.runtime.serve.errors import Refusal, explain, wrong_field
from edgemerge.runtime.serve.gate import Access
from edgemerge.runtime.serve.options import Limits
from edgemerge.runtime.serve.requests import Generating
from edgemerge.runtime.serve.responses import ResponsesRequest

MESSAGES = [{"role": "user", "content": "hello"}]


def completion(**request: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "x", **request})


def chat(**request: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": MESSAGES, **request})


def test_answers_are_bounded() -> None:
    limits = Limits(max_tokens=100)
    assert limits.tokens(completion(max_tokens=5000).max_tokens) == 100
    assert limits.tokens(completion(max_tokens=5).max_tokens) == 5
    assert limits.tokens(completion(max_tokens=None).max_tokens) == 100
    assert limits.tokens(completion().max_tokens) == 16  # OpenAI's default
    assert limits.tokens(chat().max_tokens) == 100
    assert limits.tokens(chat(max_completion_tokens=7).max_tokens) == 7
    assert limits.tokens(chat(max_completion_tokens=700).max_tokens) == 100


def test_logprobs_of_a_chat_need_no_number() -> None:
    assert chat(logprobs=True).n_alternatives == 0
    assert chat(logprobs=True, top_logprobs=3).n_alternatives == 3
    assert chat().n_alternatives is None


def test_null_is_what_the_client_leaves_open() -> None:
    open_ = dict.fromkeys(("presence_penalty", "stop", "model", "n", "logit_bias", "stream"))
    assert completion(**open_) == completion()
    more = dict.fromkeys(("tools", "tool_choice", "response_format", "max_tokens", "top_logprobs"))
    assert chat(**open_, **more) == chat()


def test_a_message_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "5"},
    ]
    found = [message.for_template() for message in chat(messages=messages).messages]
    assert [message["content"] for message in found] == ["Be brief.", "Good day", "", "5"]
    assert found[0]["role"] == "system"
    assert found[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert found[3]["tool_call_id"] == "1"


@pytest.mark.parametrize("arguments", ["no JSON", "[" * 5000, "[" * 40 + "]" * 40, r'"\ud800"'])
def test_arguments_that_are_no_json_stay_a_text(arguments: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    (found,) = chat(messages=[{"role": "assistant", "tool_calls": [call]}]).messages
    assert found.for_template()["tool_calls"][0]["function"]["arguments"] == arguments


def test_several_answers_to_one_question_differ() -> None:
    seeds = [sampling.seed for sampling in chat(n=3, seed=2**32 - 2).sampling(10)]
    assert seeds == [2**32 - 2, 0, 1]
    assert [sampling.seed for sampling in chat(n=2).sampling(10)] == [None, None]
    (sampling,) = completion(seed=-1, logit_bias={"3": -100}, temperature=0).sampling(10)
    assert (sampling.bias, sampling.temperature) == (((3, -100.0),), 0.0)
    assert 0 <= (sampling.seed or 0) < 2**32 - 1
    with pytest.raises(Refusal, match="logit_bias: a token is not 0 to 2"):
        completion(logit_bias={"3": 1}).sampling(3)


@pytest.mark.parametrize(
    ("kind", "request_", "message"),
    [
        (CompletionRequest, {"prompt": "x", "n": 17}, "n: "),
        (CompletionRequest, {"prompt": "x", "best_of": 3}, "best_of: "),
        (CompletionRequest, {"prompt": "x", "suffix": "y"}, "suffix: "),
        (CompletionRequest, {"prompt": "x", "echo": True, "stream": True}, "echo: "),
        (CompletionRequest, {"prompt": "x", "max_tokens": 0}, "max_tokens: 0"),
        (CompletionRequest, {"prompt": "x", "max_tokens": 5.0}, "max_tokens: .*integer"),
        (CompletionRequest, {"prompt": "x", "max_tokens": "5"}, "max_tokens: .*integer"),
        (CompletionRequest, {"prompt": "x", "logprobs": 21}, "logprobs: .*equal to 20"),
        (CompletionRequest, {"prompt": "x", "stop": ["a"] * 17}, "stop: .*at most 16"),
        (CompletionRequest, {"prompt": "x", "stop": ["a", ""]}, r"stop.1: .*at least 1"),
        (CompletionRequest, {"prompt": "x", "stop": ""}, "stop.0: .*at least 1"),
        (CompletionRequest, {"prompt": "x", "grammar": 'root ::= "a"'}, "grammar: "),
        (CompletionRequest, {"prompt": "x", "temperature": float("nan")}, "temperature: "),
        (CompletionRequest, {"prompt": []}, "prompt: 1 to"),
        (CompletionRequest, {"prompt": "\ud800"}, "surrogates"),
        (CompletionRequest, {"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias"),
        (ChatRequest, {"messages": []}, "messages: "),
        (ChatRequest, {"messages": [{"role": "cook", "content": "x"}]}, "messages.0.role: "),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "no images",
        ),
        (ChatRequest, {"messages": MESSAGES, "max_tokens": 0}, "max_tokens: .*equal to 1"),
        (ChatRequest, {"messages": MESSAGES, "functions": [{"name": "f"}]}, "use tools"),
        (ResponsesRequest, {"input": "x", "previous_response_id": "r"}, "keeps no answers"),
        (ResponsesRequest, {"input": []}, "input: "),
    ],
)
def test_what_it_does_not_do_is_said(
    kind: type[Generating], request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(request_)
    assert re.search(message, wrong_field(caught.value.errors()))


def test_a_response_is_a_chat() -> None:
    parts = [{"type": "input_text", "text": "hello"}]
    asked = {
        "input": [{"role": "user", "content": parts}, {"role": "assistant", "content": "hi"}],
        "instructions": "Be brief.",
        "max_output_tokens": 7,
        "temperature": 0,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
    }
    found = ResponsesRequest.model_validate(asked).as_chat()
    said = [(message.role, message.content) for message in found.messages]
    assert said == [("system", "Be brief."), ("user", "hello"), ("assistant", "hi")]
    assert (found.max_tokens, found.temperature) == (7, 0.0)
    assert ResponsesRequest.model_validate({**asked, "n": 2}).as_chat().n == 1  # a response is one
    assert found.response_format is not None
    assert found.response_format.type == "json_schema"


def test_what_a_models_process_says_has_a_status_of_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusal = explain(EngineFailure("the model's process ended by SIGKILL", 503))
    assert (refusal.status, refusal.code, refusal.retry_after) == (503, "model_unavailable", 1)
    long = "the prompt has 900 tokens and the context is 256: shorten the prompt"
    assert explain(EngineFailure(long, 400)).code == "context_length_exceeded"
    assert explain(EngineFailure("the prompt is empty", 400)).retry_after is None
    assert caplog.text == ""
    assert explain(EngineFailure("llama.cpp failed", 500)).status == 500
    assert "llama.cpp failed" in caplog.text


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
    assert len(json.dumps(explain(Refusal(400, "x" * 10_000)).content)) < 1000


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


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({}, "text.format: Unable to extract tag"),
        ({"type": "grammar"}, "text.format: Input tag 'grammar'"),
        ({"type": "json_schema", "schema": "x"}, "text.format.schema: Input should be"),
        ({"type": "json_object", "schema": 5}, "text.format: Input should be a valid dictionary"),
    ],
)
def test_a_wrong_format_of_a_response_is_told(form: dict[str, Any], says: str) -> None:
    body = ResponsesRequest.model_validate({"input": "x", "text": {"format": form}})
    with pytest.raises(Refusal, match=re.escape(says)) as caught:
        body.as_chat()
    assert caught.value.status == 400
