"""What a request may ask for: JSON in, checked against the limits, JSON out.

llama-cpp-python's routes check types. They ignore what they do not support, and they bound
nothing: both are done here, before a request waits for its turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.scores import MAX_ALTERNATIVES

__all__ = ["CHAT", "COMPLETIONS", "MODEL_ROUTES", "Limits", "check_request"]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# POST routes that use a model, and therefore wait for their turn
MODEL_ROUTES = (
    COMPLETIONS,
    CHAT,
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/extras/tokenize",
    "/extras/tokenize/count",
    "/extras/detokenize",
)

# llama-cpp-python tokenises for these in the event loop, where nothing else happens meanwhile; a
# megabyte of one letter takes seconds.
_EXTRAS, _EXTRAS_BYTES = "/extras/", 64 << 10
_MAX_STOPS = 16
_MAX_DEPTH = 32  # of nested JSON; a chat with tools has about ten
# A JSON schema becomes a grammar, and llama.cpp computes with grammars where nothing stops it: some
# of a few hundred letters never end. These words make such ones; $ref would also be fetched.
_SCHEMA_WORDS = {"pattern", "$ref", "patternProperties"}
_SCHEMA_ITEMS = 500  # values in a schema
_SCHEMA_COUNT = 200  # largest number in one, such as maxItems


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request.

    Attributes
    ----------
    body : int
        Bytes of JSON.
    max_tokens, default_tokens : int
        Tokens that one answer may have, and has where the request leaves it open.
    request_seconds : float
        From a request's turn to its end.
    read_seconds, send_seconds : float
        For the client to send its request, and to take each piece of the answer.
    """

    body: int = 1 << 20
    max_tokens: int = 4096
    default_tokens: int = 512
    request_seconds: float = 600.0
    read_seconds: float = 20.0
    send_seconds: float = 30.0


def check_request(path: str, body: bytes, limits: Limits) -> dict[str, Any]:
    """Read the JSON of a POST request and put it into bounds.

    Parameters
    ----------
    path : str
        One of `MODEL_ROUTES`.
    body : bytes
        As it came.
    limits : Limits
        The bounds.

    Returns
    -------
    dict
        The request, with what our names differ in translated and `max_tokens` bounded.

    Raises
    ------
    Refusal
        400: it is no JSON object, or asks for what this server does not do.
    """
    if path.startswith(_EXTRAS) and len(body) > _EXTRAS_BYTES:
        raise Refusal(413, f"the request is larger than {_EXTRAS_BYTES} bytes: use /tokenize")
    request = _parse(body)
    # OpenAI's clients write null for what they leave open; llama-cpp-python computes with it.
    request = {k: v for k, v in request.items() if v is not None or k == "max_tokens"}
    if path == CHAT:
        _translate_chat(request)
    if path in (COMPLETIONS, CHAT):
        _check_generation(request, limits)
    if path == COMPLETIONS:
        _check_completion(request)
    return request


def _parse(body: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise Refusal(400, f"{constant} is no JSON")

    try:
        request = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError too
        raise Refusal(400, f"the request is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise Refusal(400, "the request must be a JSON object")
    if _is_deeper(request, _MAX_DEPTH):
        raise Refusal(400, f"the request is nested deeper than {_MAX_DEPTH} levels")
    model = request.get("model")
    if model is not None and not isinstance(model, str):
        raise Refusal(400, "model: must be the name of a model")
    return request


def _is_deeper(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth == 0 or any(
        _is_deeper(item, depth - 1) for item in inner if isinstance(item, dict | list)
    )


def _check_generation(request: dict[str, Any], limits: Limits) -> None:
    """Bounds of completions and chats alike."""
    if request.get("grammar") is not None:
        raise Refusal(400, "grammar: not taken, since some never end; see response_format")
    for name in ("n", "best_of"):
        if request.get(name) not in (None, 1):
            raise Refusal(
                400, f"{name}: this server gives one answer at a time; ask again for more"
            )
    stop = request.get("stop")
    if isinstance(stop, list) and len(stop) > _MAX_STOPS:
        raise Refusal(400, f"stop: at most {_MAX_STOPS} sequences")
    if stop == "" or (isinstance(stop, list) and "" in stop):
        raise Refusal(400, "stop: an empty sequence stops before the first word")
    for name in ("max_tokens", "logprobs", "top_logprobs"):  # pydantic would take "5" for 5
        if not isinstance(request.get(name), int | None):
            raise Refusal(400, f"{name}: must be a whole number")
    for name in ("logprobs", "top_logprobs"):
        if (request.get(name) or 0) > MAX_ALTERNATIVES:
            raise Refusal(400, f"{name}: at most {MAX_ALTERNATIVES}")
    if "max_tokens" in request:
        tokens = request["max_tokens"]
        request["max_tokens"] = min(
            limits.default_tokens if tokens is None else tokens, limits.max_tokens
        )


def _translate_chat(request: dict[str, Any]) -> None:
    """OpenAI's words into llama-cpp-python's."""
    messages = request.get("messages")
    if not messages:
        raise Refusal(400, "messages: there must be one at least")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            message["content"] = _join_text(message.get("content"))
    _check_schemas(request)
    newer = request.pop("max_completion_tokens", None)
    tokens = request.setdefault("max_tokens", newer)
    if isinstance(tokens, int) and tokens < 1:
        raise Refusal(400, "max_tokens: must be 1 or more")
    if request.get("logprobs") is True and request.get("top_logprobs") is None:
        request["top_logprobs"] = 0  # llama-cpp-python takes none for no logprobs at all


def _join_text(content: Any) -> Any:
    """One text of a message's parts, as templates expect; null, beside a tool's call, is none."""
    if not isinstance(content, list):
        return "" if content is None else content
    texts = [part.get("text") if isinstance(part, dict) else None for part in content]
    if any(not isinstance(text, str) for text in texts):
        raise Refusal(400, "messages: this server takes text, no images or sounds")
    return "".join(map(str, texts))


def _check_schemas(request: dict[str, Any]) -> None:
    """Check the schemas that an answer would have to fit."""
    schemas = [request.get("response_format")]
    if isinstance(request.get("tool_choice"), dict) or isinstance(
        request.get("function_call"), dict
    ):
        schemas += [request.get("tools"), request.get("functions")]
    items = [item for schema in schemas for item in _walk(schema)]
    if len(items) > _SCHEMA_ITEMS:
        raise Refusal(400, f"the JSON schemas have more than {_SCHEMA_ITEMS} values")
    for name, value in items:
        if name in _SCHEMA_WORDS:
            raise Refusal(400, f"{name}: not possible in a JSON schema here")
        if isinstance(value, int | float) and abs(value) > _SCHEMA_COUNT:
            raise Refusal(400, f"{name}: at most {_SCHEMA_COUNT} in a JSON schema here")


def _walk(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all values inside one, each with its name or that of its list."""
    yield name, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, name)


def _check_completion(request: dict[str, Any]) -> None:
    if request.get("suffix") is not None:
        raise Refusal(400, "suffix: this server does not fill in the middle of a text")
    if request.get("stream") and request.get("echo"):
        raise Refusal(400, "echo: cannot be streamed; leave out stream")
    if request.get("max_tokens") == 0 and not request.get("echo"):
        raise Refusal(400, "max_tokens: 0 makes sense with echo only")
