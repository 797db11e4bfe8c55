"""Work on all matrices of some models, several at a time, inside a budget."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from edgemerge.errors import BudgetError, Stopped
from edgemerge.formats.quants.codec import CODECS
from edgemerge.planning.memory import header_bytes
from edgemerge.planning.plan import DEFAULT_MEMORY
from edgemerge.sizes import format_size
from edgemerge.types import Progress, Source

__all__ = ["BESIDE", "count_workers", "decoding_kernels", "work_on_all"]

BESIDE = 12 << 20  # bytes of a thread: its stack, BLAS's buffer
MIB = 1 << 20
PATIENCE = 0.2  # seconds between looks at the user's wish to stop

T = TypeVar("T")
R = TypeVar("R")


def count_workers(
    sources: Sequence[Source],
    needs: Sequence[int],
    floor: int,
    memory: int | None,
    threads: int,
    *,
    what: str,
    remedy: str = "",
) -> int:
    """Choose how many matrices are worked on at a time.

    Parameters
    ----------
    sources : sequence of Source
        The models that are read.
    needs : sequence of int
        Bytes that each matrix takes, without reading.
    floor : int
        From `floor_bytes`.
    memory : int, optional
        Budget in bytes, by default 512 MiB.
    threads : int
        At most so many.
    what, remedy : str
        Of the error: what the budget is too small for, and what else helps.

    Raises
    ------
    BudgetError
        The budget does not hold one.
    """
    budget = memory or DEFAULT_MEMORY
    reading = sum(source.work_bytes() for source in sources)
    need = max(needs, default=0) + reading + BESIDE
    fixed = floor + 2 * header_bytes(sources)
    if fixed + need > budget:
        needed = -(-(fixed + need) // MIB) * MIB
        raise BudgetError(
            f"a budget of {format_size(budget)} is too small for {what}; the smallest that works "
            f"is --memory {needed // MIB}MiB{remedy}",
            needed=needed,
            budget=budget,
        )
    return max(1, min(threads, (budget - fixed) // need))


def decoding_kernels(sources: Sequence[Source]) -> set[str]:
    """Name the kernels that decode all tensors of some models."""
    dtypes = {spec.dtype for source in sources for spec in source.specs().values()}
    return {f"{CODECS[d].kernels}.decode_{d.lower()}" for d in dtypes if CODECS[d].kernels}


def work_on_all(
    items: Sequence[T],
    sizes: Sequence[int],
    work: Callable[[T, threading.Event], R],
    n_workers: int,
    progress: Progress | None,
) -> list[R]:
    """Work on all items, the largest first; the first error stops all.

    Parameters
    ----------
    items : sequence
        Given to `work` one by one, with an event that tells it to raise `Stopped`.
    sizes : sequence of int
        Elements of each, for the order and the progress.
    work : callable
        Called on several threads.
    n_workers : int
        Threads.
    progress : callable, optional
        Called with elements done and elements in all, from this thread; may raise to stop.
    """
    stop = threading.Event()
    order = sorted(range(len(items)), key=lambda i: -sizes[i])
    with ThreadPoolExecutor(n_workers) as pool:
        futures = {pool.submit(work, items[i], stop): i for i in order}
        try:
            waiting, done = set(futures), 0
            while waiting:
                finished, waiting = wait(waiting, PATIENCE, FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                    done += sizes[futures[future]]
                if progress is not None:
                    progress(done, sum(sizes))
        except BaseException as error:
            stop.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, Stopped):  # another thread's error caused it
                for future in futures:
                    if future.done() and not future.cancelled():
                        future.result()
            raise
    by_number = {i: future.result() for future, i in futures.items()}
    return [by_number[i] for i in range(len(items))]
