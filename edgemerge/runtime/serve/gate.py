"""The gate in front of the app: who may come in, how much, and the end of every request."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from edgemerge.runtime.serve.active_request import Run, current_run
from edgemerge.runtime.serve.errors import Refusal, explain
from edgemerge.runtime.serve.options import Limits
from edgemerge.runtime.serve.request_log import RequestLog
from edgemerge.runtime.serve.requests import CHANGE_ROUTES, MODEL_ROUTES, RELOAD
from edgemerge.runtime.serve.status import Status

__all__ = ["Access", "Gate"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_HEADER_BYTES = 16 << 10  # uvicorn bounds those only that come in several parts
_DRAINED = 4  # times the largest request
_OPEN = ("/", "/health")  # and files under /static/: nothing in them is secret


@dataclass(frozen=True, slots=True)
class Access:
    """Who may come in.

    Attributes
    ----------
    key : str or None
        The API key; None lets everybody in.
    hosts : frozenset of str
        Host names that it may be asked for; empty for any. A page on the internet can reach a server
        that listens on this machine only, through the user's browser and under a name of its own that
        leads here (DNS rebinding).
    open_metrics : bool
        Whether /metrics needs no key.
    """

    key: str | None
    hosts: frozenset[str] = frozenset()
    open_metrics: bool = False

    def has_key(self, headers: Mapping[str, str]) -> bool:
        """Whether a request shows the key, or needs none."""
        if self.key is None:
            return True
        kind, _, shown = headers.get("authorization", "").partition(" ")
        # in a time that does not tell how many letters were right
        same = hmac.compare_digest(shown.strip().encode(), self.key.encode())
        return kind.lower() == "bearer" and same

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Let a request in.

        Raises
        ------
        Refusal
            401 without the key, 403 where a foreign web page is behind it.
        """
        host = headers.get("host", "")
        if self.hosts and _host_name(host) not in self.hosts:
            raise Refusal(403, "this server goes by another name", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refusal(
                403, "web pages of other sites may not use this server", code="wrong_origin"
            )
        is_open = path in _OPEN or path.startswith("/static/")
        is_open = is_open or (path == "/metrics" and self.open_metrics)
        if not is_open and not self.has_key(headers):
            raise Refusal(401, "the API key is missing or wrong", code="invalid_api_key")


def _host_name(host: str) -> str | None:
    """Without the port."""
    try:
        return urlsplit("//" + host).hostname
    except ValueError:  # brackets that do not close
        return None


class Gate:
    """ASGI middleware: access, limits, and the end of every request.

    Parameters
    ----------
    app : ASGI app
        What answers.
    access : Access
        Who may come in.
    limits : Limits
        Bounds of one request.
    status : Status
        What counts.
    routes : frozenset of str
        Paths that exist, for the counters.
    request_log : RequestLog, optional
        Where requests that use a model are written down.
    """

    def __init__(
        self,
        app: App,
        *,
        access: Access,
        limits: Limits,
        status: Status,
        routes: frozenset[str],
        request_log: RequestLog | None = None,
    ) -> None:
        self._app = app
        self._log = request_log
        self._access = access
        self._limits = limits
        self._status = status
        self._routes = routes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope["path"]
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        is_post = scope["method"] == "POST"
        uses_model = is_post and path in MODEL_ROUTES
        answer = _Answer(send, self._limits.send_seconds)
        run = Run(path)
        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > _HEADER_BYTES:
                raise Refusal(431, f"the headers are larger than {_HEADER_BYTES} bytes")
            self._access.check(path, headers)
            if is_post and not (uses_model or path == RELOAD or path in CHANGE_ROUTES):
                raise Refusal(404, "Not Found")
            if path in CHANGE_ROUTES and self._access.key is None:
                raise Refusal(
                    403, "nothing is changed here while the server has no key", code="no_key"
                )
            if is_post:
                await self._serve(scope, receive, answer, run)
            else:
                scope["has_key"] = self._access.has_key(headers)
                await self._app(scope, receive, answer.send)
            await answer.finish()
        except _Gone:
            pass
        except Exception as error:
            if not answer.has_ended:
                await answer.refuse(explain(error))
        finally:
            route = path if path in self._routes else "other"
            self._status.metrics.note_request(route, answer.status, uses_model=uses_model)
            if uses_model and self._log is not None:
                self._log.write(run, answer.status)

    async def _serve(
        self, scope: MutableMapping[str, Any], receive: Receive, answer: _Answer, run: Run
    ) -> None:
        """Answer a request with a body, until its client leaves."""
        body = await _read_body(receive, self._limits)
        token = current_run.set(run)
        try:
            app = self._app(scope, _replay(body), answer.send)
            run.task = asyncio.ensure_future(app)
        finally:
            current_run.reset(token)
        watch = asyncio.create_task(_watch(receive, run))
        self._status.runs.add(run)
        try:
            await run.task
        except asyncio.CancelledError:
            if run.refusal is None:
                raise
            raise run.refusal from None
        finally:
            self._status.runs.discard(run)
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch


async def _watch(receive: Receive, run: Run) -> None:
    """Stop the answer when its client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    run.leave()


def _replay(body: bytes) -> Receive:
    """Give the app the body, then nothing: what ends it is `Run.stop`."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    return receive


async def _read_body(receive: Receive, limits: Limits) -> bytes:
    """Read a whole request, in bounded time and memory."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(limits.read_seconds):
            more = True
            # What is too large is read on for a while, and dropped: most clients hear the answer only
            # when they have sent everything.
            while more and size <= _DRAINED * limits.body:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(499, "the client has left")
                part = message.get("body", b"")
                size += len(part)
                if size <= limits.body:
                    body += part
                more = message.get("more_body", False)
    except TimeoutError:
        raise Refusal(408, f"the request took longer than {limits.read_seconds:g} s") from None
    if size > limits.body:
        raise Refusal(413, f"the request is larger than {limits.body} bytes")
    return bytes(body)


class _Gone(ConnectionError):
    """The client does not read the answer; no route may catch it."""


class _Answer:
    """What goes back to the client.

    The head waits until the first piece of the body, so that an error can still get its own status.
    """

    def __init__(self, send: Send, timeout: float) -> None:
        self.status = 499  # until there is another
        self._send = send
        self._timeout = timeout
        self._head: Message | None = None
        self._began = self.has_ended = False

    async def send(self, message: Message) -> None:
        """Pass a message of the app on."""
        if message["type"] == "http.response.start":
            self._head = message
        elif message.get("body") or self._began:
            await self._begin()
            await self._pass(message)
        # else an empty answer, or the empty end of a stream that failed: `finish` or `refuse` decides

    async def finish(self) -> None:
        """End an answer that had no body."""
        if self._head is not None and not self._began:
            await self._begin()
            await self._pass({"type": "http.response.body", "body": b""})

    async def refuse(self, refusal: Refusal) -> None:
        """Say why there is no answer, unless there is one already."""
        if self.has_ended or (self._began and not self._is_stream) or refusal.status == 499:
            return
        if self._began:
            event = f"data: {refusal.event()}\n\n".encode()
            await self._pass({"type": "http.response.body", "body": event, "more_body": False})
            return
        body = json.dumps(refusal.content).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        pairs = [(k.encode(), v.encode()) for k, v in (headers | refusal.headers).items()]
        self._head = {"type": "http.response.start", "status": refusal.status, "headers": pairs}
        await self._begin()
        await self._pass({"type": "http.response.body", "body": body})

    @property
    def _is_stream(self) -> bool:
        pairs = self._head["headers"] if self._head is not None else ()
        return any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in pairs)

    async def _begin(self) -> None:
        if not self._began and self._head is not None:
            self._began = True
            self.status = self._head["status"]
            await self._pass(self._head)

    async def _pass(self, message: Message) -> None:
        """Send, and give up on a client that does not read."""
        is_end = message["type"] == "http.response.body" and not message.get("more_body")
        self.has_ended = self.has_ended or is_end
        try:
            async with asyncio.timeout(self._timeout):
                await self._send(message)
        except TimeoutError:
            raise _Gone from None
