"""uvicorn, with the patience of a small server: slow requests end, running answers do not."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fcntl import ioctl
from termios import TIOCOUTQ
from typing import Any, Protocol

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgemerge.errors import RuntimeFailure

__all__ = ["Handlers", "open_socket", "run_server"]

_HEADER_BYTES = 16 << 10
_HEADER_SECONDS = (
    10.0  # from a connection's opening, or a request's first byte, to its headers' end
)
_IDLE_SECONDS = 30  # between two requests
_UNREAD_SECONDS = 30.0  # in which a client has to take something of its answer
_LAST_SECONDS = 1.0  # for clients to hear that their answers are cut


class _Protocol(H11Protocol):
    """HTTP whose headers have to come and whose answers be read in time; uvicorn waits for ever."""

    _timer: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # writing pauses as soon as anything is not taken
        self._await_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_reader()

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
        self._forget_reader()
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

    def _await_reader(self) -> None:
        self._reading = self.loop.call_later(_UNREAD_SECONDS, self._check_reader, self._n_unread())

    def _check_reader(self, n_before: int) -> None:
        if self._n_unread() < n_before:  # slow, and there
            self._await_reader()
        else:
            self.transport.abort()  # `close` would wait until all is sent

    def _n_unread(self) -> int:
        """Bytes that the client has not taken: ours, and what the system has, which may be megabytes."""
        n_unread = self.transport.get_write_buffer_size()
        with suppress(OSError, ValueError):  # not told by every system, nor of a closed socket
            raw = ioctl(self.transport.get_extra_info("socket").fileno(), TIOCOUTQ, bytes(4))
            n_unread += int.from_bytes(raw, sys.byteorder)
        return n_unread

    def _forget_reader(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None


class _Server(uvicorn.Server):
    """uvicorn without its signals, which it would raise again at the end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def hang_up(self) -> None:
        """End all connections, whether their clients have read their answers or not."""
        for connection in tuple(self.server_state.connections):
            connection.transport.abort()


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
    except UnicodeError:  # as of two dots in a row
        raise RuntimeFailure(
            f"cannot listen on {host}: no machine can have this name; check --host"
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise RuntimeFailure(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port"
        ) from None
    return listener


class Handlers(Protocol):
    """What a server calls when something happens to it; all of it in the event loop."""

    async def prepare(self) -> None:
        """Do what has to be done before requests are taken; what it raises ends the server."""

    def refuse(self) -> None:
        """Let no request begin any more."""

    def cut(self) -> None:
        """End all answers that run."""

    def reload(self) -> None:
        """Read the models' files again."""

    async def finish(self) -> None:
        """Free all, after the last answer."""


def run_server(
    app: Any,
    listener: socket.socket,
    handlers: Handlers,
    on_start: Callable[[], None],
    *,
    grace: float,
    max_connections: int,
    log_requests: bool,
) -> None:
    """Serve until SIGINT or SIGTERM comes, then finish what runs. SIGHUP reloads the models.

    SIGHUP also comes when a terminal is closed, which ends the server.

    Parameters
    ----------
    app : ASGI app
        The gate.
    listener : socket
        From `open_socket`.
    handlers : Handlers
        What is called.
    on_start : function
        Called when requests are taken.
    grace : float
        Seconds that running answers get after the signal. A second signal ends them at once. Soon after,
        connections end too, also those whose clients have not read their answers.
    max_connections : int
        Further connections get 503.
    log_requests : bool
        Whether to log a line per request.
    """
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
    asyncio.run(_run(_Server(config), listener, handlers, on_start, grace))


async def _run(
    server: _Server,
    listener: socket.socket,
    handlers: Handlers,
    on_start: Callable[[], None],
    grace: float,
) -> None:
    try:
        await handlers.prepare()
        with _signals(server, handlers, grace):
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            on_start()
            await serving
    finally:
        await handlers.finish()


@contextmanager
def _signals(server: _Server, handlers: Handlers, grace: float) -> Iterator[None]:
    """Hear signals, and hand them back at the end."""
    loop = asyncio.get_running_loop()
    had_terminal = _has_terminal()

    def cut() -> None:
        handlers.cut()
        loop.call_later(_LAST_SECONDS, server.hang_up)

    def stop() -> None:
        handlers.refuse()  # whoever waits hears 503
        if server.should_exit:
            cut()
        server.should_exit = True
        loop.call_later(grace, cut)

    def hang_up() -> None:
        if had_terminal and not _has_terminal():
            stop()
        else:
            handlers.reload()

    wanted = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGHUP: hang_up}
    before = {number: signal.getsignal(number) for number in wanted}
    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in taken:
        loop.add_signal_handler(number, wanted[number])
    try:
        yield
    finally:
        for number in taken:
            loop.remove_signal_handler(number)
            with suppress(TypeError):  # a handler that was not set by Python
                signal.signal(number, before[number])


def _has_terminal() -> bool:
    """Whether there is a terminal whose closing would end this process."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
