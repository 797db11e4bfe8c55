"""A server of files on this machine: ranges, ETags, and what goes wrong with servers."""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from urllib.parse import urlsplit

LENGTH = 64  # bytes that still come before a connection is dropped


@dataclass
class FileServer:
    """A folder by http, and what is to go wrong.

    `refuse` is asked with each path and the request's number, and returns a status in place of an answer.
    """

    folder: Path
    url: str = ""
    ranges: bool = True
    etags: bool = True
    most: int | None = None  # bytes that are sent at most of a range
    headers: dict[str, str] = field(default_factory=dict)  # what answers state otherwise
    drop_each: int = 0  # every n-th answer of a range, or without ranges, ends after `LENGTH` bytes
    redirects: dict[str, str] = field(default_factory=dict)  # path -> where it leads
    login: str | None = None  # value of Authorization that is needed
    refuse: Callable[[str, int], int | None] = lambda path, number: None
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    clients: list[int] = field(default_factory=list)  # port of each request's connection
    hosts: list[str] = field(default_factory=list)
    sent: int = 0  # bytes of bodies
    pause: Event = field(default_factory=Event)  # cleared: no answer comes
    files: dict[tuple[Path, int], tuple[bytes, str]] = field(default_factory=dict, repr=False)
    lock: Lock = field(default_factory=Lock)

    def asked(self, name: str) -> list[str | None]:
        """Return the ranges that were asked of a file."""
        return [wanted for path, wanted, _ in self.requests if path.rpartition("/")[2] == name]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FileServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError, ssl.SSLError):
            super().handle()

    def do_GET(self) -> None:
        owner, path = self.owner, urlsplit(self.path).path  # of a proxy's whole address too
        wanted = self.headers.get("Range")
        with owner.lock:
            owner.requests.append((path, wanted, self.headers.get("Authorization")))
            owner.hosts.append(self.headers.get("Host", ""))
            owner.clients.append(self.client_address[1])
            number = len(owner.requests)
        status = owner.refuse(path, number)
        owner.pause.wait()
        if status:
            self._answer(status, b"<html>refused</html>", {})
        elif path in owner.redirects:
            self._answer(302, b"", {"Location": owner.redirects[path]})
        elif owner.login and self.headers.get("Authorization") != owner.login:
            self._answer(401, b"", {})
        elif not (owner.folder / path.lstrip("/")).is_file():
            self._answer(404, b"<html>no such file</html>", {})
        else:
            self._file(owner.folder / path.lstrip("/"), wanted, number)

    def _file(self, path: Path, wanted: str | None, number: int) -> None:
        owner, key = self.owner, (path, path.stat().st_mtime_ns)
        if key not in owner.files:
            raw = path.read_bytes()
            owner.files[key] = raw, f'"{hashlib.md5(raw).hexdigest()}"'
        raw, etag = owner.files[key]
        headers = {"ETag": etag} if owner.etags else {}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        if match is None or not owner.ranges:
            self._answer(200, raw, headers, 0 if owner.ranges else number)
            return
        start, stop = int(match[1]), min(len(raw), int(match[2]) + 1)
        if start >= len(raw):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(raw)}"})
            return
        stop = stop if owner.most is None else min(stop, start + owner.most)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(raw)}"
        self._answer(206, raw[start:stop], headers, number)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], number: int = 0) -> None:
        self.send_response(status)
        stated = {**headers, "Content-Length": str(len(body)), **self.owner.headers}
        for name, value in stated.items():
            self.send_header(name, value)
        self.end_headers()
        is_dropped = self.owner.drop_each and number and number % self.owner.drop_each == 0
        if is_dropped and len(body) > LENGTH:
            self.wfile.write(body[:LENGTH])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(body)
        with self.owner.lock:
            self.owner.sent += len(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that go away are part of the tests."""


@contextmanager
def serve_folder(folder: Path, *, context: ssl.SSLContext | None = None) -> Iterator[FileServer]:
    """Serve a folder until the end of the block, with TLS where there is a context."""
    owner = FileServer(folder)
    owner.pause.set()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": owner}))
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scheme, port = "http" if context is None else "https", server.server_address[1]
    owner.url = f"{scheme}://{'127.0.0.1' if context is None else 'localhost'}:{port}"
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield owner
    finally:
        owner.pause.set()
        server.shutdown()
        server.server_close()
        thread.join()
