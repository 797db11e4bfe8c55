"""Debian's nginx on this machine, with TLS, behind a relay that cuts connections."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import Thread

PIECE = 1 << 14
CONFIGURATION = """
daemon off;
master_process off;
pid nginx.pid;
error_log error.log;
events {{ worker_connections 256; }}
http {{
    access_log access.log;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        root {root};
    }}
}}
"""


@dataclass
class Nginx:
    """The server, and a relay in front of it, whose address is `url`.

    After each piece of an answer the connection is cut with the probability `cut`.
    """

    folder: Path
    port: int
    url: str = ""
    cut: float = 0.0
    n_cut: int = 0
    draw: Random = field(default_factory=lambda: Random(7))
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = find_nginx()
        assert program is not None
        command = [program, "-p", str(self.folder), "-c", "nginx.conf", "-e", "error.log"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        for _ in range(200):
            assert self.process.poll() is None, (self.folder / "error.log").read_text()
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        raise AssertionError("nginx did not come up")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def relay(self, client: socket.socket) -> None:
        """Carry one connection, until it ends or is cut."""
        with (
            client,
            suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port)) as server,
        ):
            Thread(target=_pump, args=(client, server), daemon=True).start()
            with suppress(OSError):
                self._answer(server, client)
            for end in (client, server):
                with suppress(OSError):  # a thread may read from it, so to close it is not enough
                    end.shutdown(socket.SHUT_RDWR)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        while raw := server.recv(PIECE):
            client.sendall(raw)
            if self.draw.random() < self.cut:
                self.n_cut += 1
                return


def find_nginx() -> str | None:
    """Return the program, if it is installed."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@contextmanager
def serve_by_nginx(root: Path, folder: Path, certificate: Path, key: Path) -> Iterator[Nginx]:
    """Serve a folder until the end of the block; another is for nginx itself."""
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "nginx.conf").write_text(
        CONFIGURATION.format(port=port, certificate=certificate, key=key, root=root)
    )
    nginx = Nginx(folder, port)
    nginx.start()
    door = socket.create_server(("127.0.0.1", 0))
    nginx.url = f"https://localhost:{door.getsockname()[1]}"
    thread = Thread(target=_accept, args=(door, nginx), daemon=True)
    thread.start()
    try:
        yield nginx
    finally:
        door.shutdown(socket.SHUT_RDWR)
        thread.join()
        door.close()
        nginx.stop()


def _accept(door: socket.socket, nginx: Nginx) -> None:
    with suppress(OSError):
        while True:
            Thread(target=nginx.relay, args=(door.accept()[0],), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while raw := source.recv(PIECE):
            target.sendall(raw)
        target.shutdown(socket.SHUT_WR)
