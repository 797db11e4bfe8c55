"""A Dask worker with our defaults: one process, one budget, a nice neighbour."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemerge.cluster.address import prepare_dask
from edgemerge.cluster.connection import PATIENCE
from edgemerge.errors import ClusterError

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["run_worker"]

SWITCH_SECONDS = 0.002  # for the thread that talks to the scheduler to have its turn between blocks


def run_worker(
    address: str,
    *,
    threads: int,
    memory: int,
    niceness: int,
    folder: Path | None,
    host: str | None,
    say: Callable[[str], None],
) -> None:
    """Work for a scheduler until this process is stopped; find it again where it was restarted.

    Parameters
    ----------
    address : str
        Of the scheduler.
    threads : int
        Tasks at a time.
    memory : int
        Budget of this process in bytes.
    niceness : int
        Added to that of this process, nice(2).
    folder : Path, optional
        For temporary files.
    host : str, optional
        Address of this machine to listen on; else the one that reaches the scheduler.
    say : callable
        Told what happens, one sentence at a time.

    Raises
    ------
    ClusterError
        No scheduler answers for long, or Dask is missing.
    """
    prepare_dask()
    os.nice(niceness)
    sys.setswitchinterval(SWITCH_SECONDS)
    asyncio.run(_serve(address, threads, memory, folder, host, say))


async def _serve(
    address: str,
    threads: int,
    memory: int,
    folder: Path | None,
    host: str | None,
    say: Callable[[str], None],
) -> None:
    while True:
        worker = await _find_scheduler(
            address,
            nthreads=threads,
            memory_limit=memory,
            local_directory=None if folder is None else str(folder),
            host=host,
            dashboard_address="127.0.0.1:0",
        )
        say(f"working for {address} as {worker.address} with {threads} threads")
        try:
            await worker.finished()
        finally:
            with suppress(Exception):
                await worker.close(timeout=2, nanny=False)
        say(f"lost {address}; looking for it again")


async def _find_scheduler(address: str, **settings: Any) -> Worker:
    """Return a worker that its scheduler knows."""
    from distributed import Worker

    started = time.monotonic()
    while True:
        try:
            return await Worker(address, **settings)
        except (OSError, RuntimeError) as error:
            if time.monotonic() - started > PATIENCE:
                raise ClusterError(
                    f"no Dask scheduler answers at {address}; start one with dask scheduler, or check the "
                    "address"
                ) from error
            await asyncio.sleep(1.0)
