"""Debian's nginx on this machine, with TLS, behind a relay that drops connections."""

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
from threading import Lock, Thread


@dataclass
class Nginx:
    """The server, its relay and what became of connections.

    `drop` is the part of all pieces of 16 KiB after which a connection is cut.
    """

    url: str
    folder: Path
    port: int
    drop: float = 0.0
    connections: int = 0
    dropped: int = 0
    draw: Random = field(default_factory=lambda: Random(7))
    lock: Lock = field(default_factory=Lock)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = find_nginx()
        assert program is not None
        command = [program, "-p", str(self.folder), "-c", "nginx.conf", "-e", "error.log"]
        self.process = subprocess.Popen(command)
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
            # Its workers see that their channel to it is gone, and end.
            for _ in range(200):
                with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                    time.sleep(0.02)
                    continue
                return


def find_nginx() -> str | None:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
