"""Requests that no honest client sends, as bytes for a socket; the same seed gives the same ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

__all__ = ["make_request"]

ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/v1/responses",
    "/v1/rerank",
)
PATHS = (
    "/",
    "/health",
    "/metrics",
    "/v1/models",
    "/tokenizer_info",
    "/static/../../../../etc/passwd",
    "/static/..%2f..%2f..%2fetc%2fpasswd",
    "/static/%00",
    "/static/\xff\xfe",
    "//etc/passwd",
    "http://localhost/../x",
    "*",
    "/" + "a/" * 4000,
    "/v1/models?" + "x" * 20_000,
    "/v1/models/%F0%28%8C%28",
    "/openapi.json",
    "/docs",
)
FIELDS = (
    "prompt", "messages", "input", "tokens", "model", "max_tokens", "temperature", "top_p",
    "top_k", "min_p", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "n",
    "best_of", "seed", "logit_bias", "logit_bias_type", "grammar", "response_format", "tools",
    "tool_choice", "functions", "function_call", "presence_penalty", "frequency_penalty",
    "repeat_penalty", "mirostat_mode", "mirostat_tau", "user", "suffix",
)  # fmt: skip
VALUES: tuple[object, ...] = (
    None, True, False, 0, -1, 1, 3, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 0.5, -0.5, 1e308, 1e-308,
    "", "x", "5", "\ud800", "\x00", "é" * 40, "x" * 5000, [], {}, [[]], [{}], [None], [1, "x"], [-1],
    [1 << 40], [""], ["x", 1], {"x": None}, {"1": 1e9}, {"-1": 1}, {"x": "y"}, {"type": "json_object"},
    {"type": "json_object", "schema": {"type": []}}, {"type": "json_object", "schema": {"$ref": "x"}},
    {"include_usage": True}, [{"role": "user", "content": "Hi"}], [{"role": "x", "content": 1}],
    [{"role": "user", "content": [{"type": "text", "text": 1}]}], [{"content": "x"}], [{"role": []}],
    {"type": "function", "function": {"name": "f"}},
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}],
)  # fmt: skip
BODIES = (
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"{}",
    b"\xff\xfe{}",
    b'{"prompt": "\xff"}',
    b'{"prompt": NaN}',
    b'{"prompt": 1e999}',
    b'{"prompt": ' + b"9" * 5000 + b"}",
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"messages": ' * 100 + b"1" + b"}" * 100,
    b'{"prompt": "x", "prompt": 1}',
    b'{"prompt": "x"} {"prompt": "y"}',
    b'{"prompt": "' + b"x" * (1 << 16) + b'"}',
    b'{"a": 1' + b', "a": 1' * 20_000 + b"}",
    b"\x00" * 100,
)
LINES = (
    "GET",
    "GET /",
    "GET / HTTP/9.9",
    "GET / HTTP/1.1 x",
    " GET / HTTP/1.1",
    "get / http/1.1",
    "GET\t/\tHTTP/1.1",
    "G\x00T / HTTP/1.1",
    "CONNECT localhost:1 HTTP/1.1",
    "TRACE / HTTP/1.1",
    "DELETE /v1/models HTTP/1.1",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "OPTIONS * HTTP/1.1",
    "M" * 5000 + " / HTTP/1.1",
    "GET  HTTP/1.1",
    "GET /\xe9 HTTP/1.1",
)
HEADERS = (
    "Content-Length: -1",
    "Content-Length: 1e3",
    "Content-Length: 99999999999999999999",
    "Content-Length: 5\r\nContent-Length: 6",
    "Content-Length: 4\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: gzip",
    "Transfer-Encoding: chunked, chunked",
    "No colon",
    ": no name",
    "Folded: a\r\n b",
    "X: \x00",
    "X\x01: y",
    "Host: a\r\nHost: b",
    "Host: [::1",
    "Host: evil.example",
    "Origin: http://evil.example",
    "Authorization: Bearer",
    "Authorization: Bearer \xff\xff",
    "Authorization: " + "x" * 12_000,
    "Content-Type: text/html; charset=\xff",
    "Content-Type: multipart/form-data; boundary=",
    "Content-Encoding: gzip",
    "Expect: 100-continue",
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13",
    "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings",
    "X: " + "y" * 40_000,
    "\r\n".join(f"X-{i}: y" for i in range(600)),
    "Cookie: " + "a=b; " * 1000,
    "Range: bytes=0-" + "9" * 500,
)
CHUNKS = (
    b"FFFFFFFFFFFFFFFF\r\nx",
    b"zz\r\nx\r\n0\r\n\r\n",
    b"-1\r\n\r\n",
    b"5\r\nab",
    b"1;" + b"x" * 9000,
)


def make_request(seed: int, key: str) -> bytes:
    """Make a malformed request.

    Parameters
    ----------
    seed : int
        Which one.
    key : str
        The server's, so that most come past the door.
    """
    rng = random.Random(seed)
    return rng.choice(KINDS)(rng, key)


def _head(line: str, key: str, *headers: str) -> bytes:
    lines = [line, "Host: localhost", f"Authorization: Bearer {key}", "Connection: close", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _post(rng: random.Random, key: str, body: bytes) -> bytes:
    length = f"Content-Length: {len(body)}"
    return _head(f"POST {rng.choice(ROUTES)} HTTP/1.1", key, length) + body


def _noise(rng: random.Random, _key: str) -> bytes:
    return rng.randbytes(rng.randint(1, 300)) + rng.choice((b"", b"\r\n\r\n"))


def _tls(rng: random.Random, _key: str) -> bytes:
    return b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(64)


def _line(rng: random.Random, key: str) -> bytes:
    return _head(rng.choice(LINES), key)


def _path(rng: random.Random, key: str) -> bytes:
    return _head(f"{rng.choice(('GET', 'POST', 'HEAD', 'PUT'))} {rng.choice(PATHS)} HTTP/1.1", key)


def _header(rng: random.Random, key: str) -> bytes:
    path = rng.choice((*PATHS[:5], *ROUTES))
    line = f"{rng.choice(('GET', 'POST'))} {path} HTTP/1.1"
    return _head(line, key, rng.choice(HEADERS)) + rng.choice(BODIES[:5])


def _chunked(rng: random.Random, key: str) -> bytes:
    head = _head(f"POST {rng.choice(ROUTES)} HTTP/1.1", key, "Transfer-Encoding: chunked")
    return head + rng.choice(CHUNKS)


def _body(rng: random.Random, key: str) -> bytes:
    return _post(rng, key, rng.choice(BODIES))


def _types(rng: random.Random, key: str) -> bytes:
    request = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "input": "x"}
    wrong = {rng.choice(FIELDS): rng.choice(VALUES) for _ in range(rng.randint(1, 3))}
    return _post(rng, key, json.dumps(request | wrong).encode())


def _mutated(rng: random.Random, key: str) -> bytes:
    raw = bytearray(_types(rng, key))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(raw))
        match rng.randrange(3):
            case 0:
                raw[at] = rng.randrange(256)
            case 1:
                del raw[at : at + rng.randint(1, 20)]
            case _:
                raw[at:at] = rng.randbytes(rng.randint(1, 20))
        if not raw:
            return b"\0"
    return bytes(raw)


def _cut(rng: random.Random, key: str) -> bytes:
    raw = _types(rng, key)
    return raw[: rng.randrange(1, len(raw))]


def _stranger(rng: random.Random, _key: str) -> bytes:
    return _types(rng, "wrong")


Kind = Callable[[random.Random, str], bytes]
KINDS: tuple[Kind, ...] = (
    _noise,
    _tls,
    _line,
    _path,
    _header,
    _chunked,
    _body,
    _types,
    _types,
    _types,
    _mutated,
    _cut,
    _stranger,
)
