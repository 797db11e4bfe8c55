"""A server that says what a test tells it to, for the web page: the real one is polite and slow."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import edgemerge.runtime.serve

STATIC = Path(edgemerge.runtime.serve.__file__).parent / "static"
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}
TYPES |= {".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class PageStub:
    """The routes the page uses; set its attributes between two requests.

    Attributes
    ----------
    pieces : list of str
        The answer, one event each.
    pause : float
        Seconds between two events.
    refusal : (int, dict, dict) or None
        Status, headers and body of the answer to the next question alone.
    broken : bool
        Whether the stream ends after its pieces without saying so.
    torn : bool
        Whether the connection ends in the middle of each document.
    key : str or None
        What the server asks for.
    model_state : dict
        What /health tells of the model.
    listing : float
        Seconds that the list of models takes.
    requests : list of dict
        Bodies of the questions.
    admin : dict
        Answers under /admin/ by path; a pair has the status too.
    changes : list of (str, dict)
        Path and body of each request to change something there.
    """

    def __init__(self, port: int = 0) -> None:
        self.pieces = ["Hel", "lo", " there."]
        self.pause = 0.0
        self.refusal: tuple[int, dict[str, str], dict[str, Any]] | None = None
        self.broken = False
        self.torn = False
        self.key: str | None = None
        self.models = ["ward", "base"]
        self.listing = 0.0
        self.model_state: dict[str, Any] = {
            "state": "loaded",
            "bytes": 98 << 20,
            "running": 3,
            "sequences": 8,
        }
        self.requests: list[dict[str, Any]] = []
        self.admin: dict[str, Any] = {}
        self.changes: list[tuple[str, dict[str, Any]]] = []
        self.looks = 0  # at /health
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def health(self) -> dict[str, Any]:
        self.looks += 1
        return {
            "status": "ok",
            "version": "0.1.0",
            "uptime_s": 61.0 + self.looks,
            "queue": {"running": 1, "waiting": 2, "limit": 16},
            "models": [self.model_state | {"id": self.models[0]}],
            "memory": {"rss": (200 + self.looks) << 20, "limit": 1 << 30, "available": 3 << 30},
            "temperature_c": 48.0 + self.looks % 3,
            "throttled": False,
            "tokens_per_second": 20.0 + self.looks,
            "time_to_first_token_s": 0.25,
            "requests": {"answered": self.looks, "refused": 0, "failed": 0},
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                if self.path == "/" or self.path.startswith("/static/"):
                    name = self.path.removeprefix("/static/").strip("/") or "index.html"
                    return self._send(200, (STATIC / name).read_bytes(), TYPES[Path(name).suffix])
                if self.path == "/health":
                    health = stub.health()
                    if not self._is_known():
                        health = {key: health[key] for key in ("status", "version")}
                    return self._send_json(200, health)
                if not self._is_known():
                    return self._refuse()
                if self.path in stub.admin:
                    return self._answer_admin()
                time.sleep(stub.listing)
                return self._send_json(200, {"data": [{"id": name} for name in stub.models]})

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(length))
                if self.path.startswith("/admin/"):
                    stub.changes.append((self.path, body))
                    return self._answer_admin() if self._is_known() else self._refuse()
                stub.requests.append(body)
                if not self._is_known():
                    return self._refuse()
                if stub.refusal is not None:
                    (status, headers, body), stub.refusal = stub.refusal, None
                    return self._send_json(status, {"error": body}, headers)
                return self._stream()

            def _stream(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                deltas = [({"content": piece}, None) for piece in stub.pieces]
                for delta, reason in [({"role": "assistant"}, None), *deltas, ({}, "stop")]:
                    if stub.broken and reason:
                        return
                    event = {"choices": [{"delta": delta, "finish_reason": reason}]}
                    try:
                        self.wfile.write(f"data: {json.dumps(event)}\r\n\r\n".encode())
                    except ConnectionError:  # the reader has left
                        return
                    time.sleep(stub.pause)
                self.wfile.write(b"data: [DONE]\r\n\r\n")

            def _answer_admin(self) -> None:
                answer = stub.admin.get(self.path, {})
                status, body = answer if isinstance(answer, tuple) else (200, answer)
                self._send_json(status, body if status == 200 else {"error": body})

            def _is_known(self) -> bool:
                sent = self.headers.get("Authorization")
                return stub.key is None or sent == f"Bearer {stub.key}"

            def _refuse(self) -> None:
                self._send_json(401, {"error": {"message": "wrong key", "code": "invalid_api_key"}})

            def _send_json(
                self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None
            ) -> None:
                document = json.dumps(body).encode()
                length = {"Content-Length": str(2 * len(document))} if stub.torn else {}
                self._send(status, document, "application/json", length | (headers or {}))

            def _send(
                self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None
            ) -> None:
                self.send_response(status)
                extra = {"Content-Type": kind, "Content-Length": str(len(body))}
                extra["Content-Security-Policy"] = POLICY
                for name, value in (extra | (headers or {})).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        return Handler
