"""A Dask scheduler and workers of ours, each a process that a test may kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.places import ROOT

QUIET = ["--nice", "0", "--threads", "1"]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class DaskCluster:
    """A scheduler on loopback and its workers."""

    def __init__(self, folder: Path, n_workers: int) -> None:
        self.folder = folder
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []
        self.start_scheduler()
        for _ in range(n_workers):
            self.add_worker()

    def start_scheduler(self) -> None:
        port = self.address.rpartition(":")[2]
        self.scheduler = self._start(
            "-m",
            "distributed.cli.dask_scheduler",
            *("--host", "127.0.0.1", "--port", port, "--no-dashboard", "--no-show"),
        )

    def add_worker(self, *options: str) -> subprocess.Popen[bytes]:
        where = ["--host", "127.0.0.1", "--directory", str(self.folder)]
        worker = self._start("-m", "edgemerge", "worker", self.address, *where, *QUIET, *options)
        self.workers.append(worker)
        return worker

    def kill(self, one: subprocess.Popen[bytes]) -> None:
        one.send_signal(signal.SIGKILL)
        one.wait(10)
        if one in self.workers:
            self.workers.remove(one)

    def close(self) -> None:
        for one in [*self.workers, *filter(None, [self.scheduler])]:
            self.kill(one)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self.folder / "cluster.log").open("ab")
        with log:
            return subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=log, env=environment()
            )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@contextmanager
def dask_cluster(folder: Path, n_workers: int) -> Iterator[DaskCluster]:
    cluster = DaskCluster(folder, n_workers)
    try:
        yield cluster
    finally:
        cluster.close()


def start_client(orders: Sequence[dict[str, Any]], **patches: object) -> subprocess.Popen[str]:
    """Start a process that merges as `tests.support.cluster_client` reads."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.cluster_client", json.dumps([orders, patches])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def merge_by_client(orders: Sequence[dict[str, Any]], **patches: Any) -> list[dict[str, Any]]:
    """Return what came of each merge: its report, or its error."""
    with start_client(orders, **patches) as client:
        out, err = client.communicate(timeout=120)
    assert client.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]
