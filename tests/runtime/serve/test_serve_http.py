"""The HTTP side: clients that send nothing, addresses, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.serve import http as serve_http
from edgemerge.runtime.serve.http import open_socket, run_server

pytestmark = pytest.mark.llama

MUCH = 16 << 20  # bytes: more than the system takes for a client that does not read


async def say_hello(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await asyncio.sleep(0.5 if scope["path"] == "/slow" else 0.0)
    headers = [(b"content-length", b"5")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello"})


async def say_much(scope: dict[str, Any], receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"%d" % MUCH)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": bytes(MUCH)})


class Noted:
    """What the server calls, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def prepare(self) -> None:
        self.calls.append("prepare")

    def refuse(self) -> None:
        self.calls.append("refuse")

    def cut(self) -> None:
        self.calls.append("cut")

    def reload(self) -> None:
        self.calls.append("reload")

    async def finish(self) -> None:
        self.calls.append("finish")


def serve_while(
    client: Callable[[int], None], app: Any = say_hello, grace: float = 5.0
) -> list[str]:
    """Run a server in this thread and a client in another, which ends it by SIGTERM."""
    problems: list[BaseException] = []

    def talk(port: int) -> None:
        try:
            client(port)
        except BaseException as error:
            problems.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with open_socket("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=talk, args=(listener.getsockname()[1],))
        run_server(
            app,
            listener,
            handlers := Noted(),
            thread.start,
            grace=grace,
            max_connections=10,
            log_requests=False,
        )
        thread.join()
    assert problems == []
    return handlers.calls


def test_headers_that_do_not_come_end_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_http, "_HEADER_SECONDS", 0.3)

    def client(port: int) -> None:
        for sent in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\nX: "):
            begin = time.monotonic()
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(sent)
                assert connection.recv(100) == b""
            assert 0.2 < time.monotonic() - begin < 3.0

    serve_while(client)


def test_an_answer_may_take_longer_and_a_connection_be_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve_http, "_HEADER_SECONDS", 0.2)

    def client(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            for path in (b"/slow", b"/"):
                connection.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
                answer = b""
                while not answer.endswith(b"hello"):
                    part = connection.recv(1000)
                    assert part
                    answer += part
                time.sleep(0.3)  # idle is not slow

    serve_while(client)


def ask(port: int) -> socket.socket:
    """Ask for something, and do not read the answer."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert connection.recv(4) == b"HTTP"
    return connection


def read_all(connection: socket.socket, pause: float = 0.0) -> int:
    """Bytes that come, in parts."""
    size = 0
    try:
        while part := connection.recv(128 << 10):
            size += len(part)
            time.sleep(pause)
            if size >= MUCH:
                return size
    except ConnectionResetError:
        pass
    return size


def test_an_answer_that_nobody_reads_ends_and_a_slow_reader_gets_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve_http, "_UNREAD_SECONDS", 0.4)

    def client(port: int) -> None:
        with ask(port) as connection:
            assert read_all(connection, pause=0.01) >= MUCH
        with ask(port) as connection:
            time.sleep(1.0)
            assert read_all(connection) < MUCH

    serve_while(client, say_much)


def test_a_reader_that_takes_little_at_a_time_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_http, "_UNREAD_SECONDS", 0.4)

    def client(port: int) -> None:
        with ask(port) as connection:
            n_read = 0
            for _ in range(15):
                n_read += len(connection.recv(100_000, socket.MSG_WAITALL))
                time.sleep(0.1)
            while n_read < MUCH and (part := connection.recv(1 << 20)):
                n_read += len(part)
            assert n_read >= MUCH

    serve_while(client, say_much)


@pytest.mark.parametrize("n_signals", [1, 2])
def test_the_server_ends_though_a_client_does_not_read(
    n_signals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_http, "_LAST_SECONDS", 0.2)
    opened: list[socket.socket] = []
    begin = 0.0

    def client(port: int) -> None:
        nonlocal begin
        opened.append(ask(port))
        begin = time.monotonic()
        for _ in range(n_signals - 1):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        timer = threading.Timer(6.0, opened[0].close)  # else a failure would not end
        timer.daemon = True
        timer.start()

    calls = serve_while(client, say_much, grace=0.5 if n_signals == 1 else 60.0)
    seconds = time.monotonic() - begin
    opened[0].close()
    assert calls[-2:] == ["cut", "finish"]
    assert seconds < 5.0


def test_a_port_is_taken_once() -> None:
    with open_socket("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(RuntimeFailure, match=f"127.0.0.1 port {port}: .*; choose another"):
            open_socket("127.0.0.1", port)
    with open_socket("localhost", port) as again:
        assert again.getsockname()[1] == port


def test_signals_are_handed_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert serve_while(lambda port: None) == ["prepare", "refuse", "finish"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_sighup_reloads_and_ends_nothing() -> None:
    def client(port: int) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.2)

    assert serve_while(client) == ["prepare", "reload", "refuse", "finish"]
