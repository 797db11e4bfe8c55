"""uvicorn, with the patience of a small server: slow requests end, running answers do not."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from sse_starlette.sse import AppStatus
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.serve.queue import Queue
from edgemerge.runtime.serve.status import Status

__all__ = ["open_socket", "run_server"]

_HEADER_BYTES = 16 << 10
_HEADER_SECONDS = (
    10.0  # from a connection's opening, or a request's first byte, to its headers' end
)
_IDLE_SECONDS = 30  # between two requests
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Protocol(H11Protocol):
    """HTTP whose headers have to come in time; uvicorn waits for them for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_between_requests:
            self._await_headers()  # the beginning of the next ones
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    @property
    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_headers(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(_HEADER_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        if self._is_between_requests and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn without its signals: it would raise them again at the end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def open_socket(host: str, port: int) -> socket.socket:
    """Take the port, before models are loaded.

    Parameters
    ----------
    host : str
        Address or name.
    port : int
        0 for any free one.

    Raises
    ------
    RuntimeFailure
        The port is in use, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RuntimeFailure(f"cannot listen on {host}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise RuntimeFailure(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port"
        ) from None
    return listener


def run_server(
    app: Any,
    listener: socket.socket,
    *,
    queue: Queue,
    status: Status,
    grace: float,
    max_connections: int,
    log_requests: bool,
    on_start: Callable[[], None],
) -> None:
    """Serve until a signal comes, then finish what runs.

    Parameters
    ----------
    app : ASGI app
        The gate.
    listener : socket
        From `open_socket`.
    queue, status
        The gate's.
    grace : float
        Seconds that a running answer gets after the signal. A second signal ends it at once.
    max_connections : int
        Further connections get 503.
    log_requests : bool
        Whether to log a line per request.
    on_start : function
        Called when the server takes requests.
    """
    AppStatus.enable_automatic_graceful_drain = False  # it cuts streams off at the first signal
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=log_requests,
        limit_concurrency=max_connections,
        timeout_keep_alive=_IDLE_SECONDS,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        server_header=False,
        proxy_headers=False,
    )
    asyncio.run(_run(_Server(config), listener, queue, status, grace, on_start))


async def _run(
    server: _Server,
    listener: socket.socket,
    queue: Queue,
    status: Status,
    grace: float,
    on_start: Callable[[], None],
) -> None:
    loop = asyncio.get_running_loop()

    def cut() -> None:
        if status.run is not None:
            status.run.shut_down()

    def stop() -> None:
        queue.close()  # whoever waits hears 503
        if server.should_exit:
            cut()
        server.should_exit = True
        loop.call_later(grace, cut)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in taken:
        loop.add_signal_handler(number, stop)
    try:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        on_start()
        await serving
    finally:
        for number in taken:
            loop.remove_signal_handler(number)
            with suppress(TypeError):  # a handler that was not set by Python
                signal.signal(number, before[number])
