"""Workers of `edgemerge rpc-worker`, each a process of its own, for tests that split a model."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.library import load_library
from edgemerge.runtime.rpc.backend import load_backend

COMMAND = [sys.executable, "-m", "edgemerge", "rpc-worker", "-t", "1", "--listen"]
PATIENCE = 60.0  # seconds
LASTING = 10  # looks at a connection


def why_not() -> str:
    """Say why there can be no worker here; empty where there can."""
    try:
        load_backend(load_library())
    except RuntimeFailure as failure:
        return str(failure)
    return ""


class RpcWorker:
    """A worker on a port of its own; use it in a `with` statement."""

    def __init__(self, address: str | None = None, *, before: Sequence[str] = ()) -> None:
        self.address = address or f"127.0.0.1:{_free_port()}"
        trust = [] if self.address.startswith("127.") else ["--i-trust-this-network"]
        self.process = subprocess.Popen(
            [*before, *COMMAND, self.address, *trust],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert re.search(re.escape(self.address), self.line), self.line + self._errors()

    def _errors(self) -> str:
        self.process.kill()
        return self.process.communicate()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.kill()
        self.process.communicate()

    def wait_until_used(self) -> None:
        """Wait for a connection that is more than a look whether it is there."""
        end = time.monotonic() + PATIENCE
        n_seen = 0
        while n_seen < LASTING:
            n_seen = n_seen + 1 if self._is_connected() else 0
            assert time.monotonic() < end, "nobody came"
            time.sleep(0.05)

    def _is_connected(self) -> bool:
        """Whether the kernel has an established (01) connection at its port (proc_net_tcp(5))."""
        port = f":{int(self.address.rpartition(':')[2]):04X}"
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        return any(row[1].endswith(port) and row[3] == "01" for row in rows)

    def pause(self) -> None:
        """Compute nothing more; the connection stays."""
        self.process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait(PATIENCE)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
