"""Workers of a cluster that is this machine's own: each is a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed.security import Security

__all__ = ["local_worker"]


@contextmanager
def local_worker(
    address: str, words: Sequence[str], security: Security
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a worker on this machine, and end it; a session of its own keeps the terminal's Ctrl-C away."""
    command = [sys.executable, "-m", "edgemerge", "worker", address, "--host", "127.0.0.1", *words]
    tls = "DASK_DISTRIBUTED__COMM__TLS__"
    keys = {
        f"{tls}CA_FILE": security.tls_ca_file,
        f"{tls}WORKER__CERT": security.tls_worker_cert,
        f"{tls}WORKER__KEY": security.tls_worker_key,
    }
    nothing = subprocess.DEVNULL
    child = subprocess.Popen(
        [*command, "--nice", "0"],
        stdin=nothing,
        stdout=nothing,
        stderr=nothing,
        start_new_session=True,
        env={**os.environ, **keys},  # which no other user sees
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()
