"""From a memory budget to block heights and workers, and the arenas that hold the blocks.

The budget bounds the peak resident memory of the whole process. The interpreter, the modules and the models'
headers take a part of it. The workers divide the rest: each has one arena, allocated once. A tensor's blocks
are as high as fits in the arena.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemerge.errors import BudgetError
from edgemerge.machine.process import read_process
from edgemerge.sizes import format_size

__all__ = [
    "FLOOR_BYTES",
    "SOLVER_BYTES",
    "Arena",
    "ArenaNeed",
    "blocks_in_arena",
    "divide_budget",
    "floor_bytes",
    "rows_in_arena",
    "workers_on",
]

MIB = 1 << 20

# Interpreter, NumPy, our modules and the machine code of the kernels: 42 to 50 MiB as a rule, and more where
# the page cache holds libraries in large folios, all of which Linux then maps. Numba and LLVM, three times as
# much, never enter the process (`edgemerge.native`). tests/merging/test_budget_rss.py measures it.
FLOOR_BYTES = 64 * MIB
GROWTH_BYTES = (
    24 * MIB
)  # modules and kernels that a merge loads into a process that is larger already
RETRY_BYTES = (
    8 * MIB
)  # what such a process may grow by until the call is made again with more memory
WORKER_BYTES = 1 * MIB  # a thread's stack and its Python objects
SOLVER_BYTES = 72 << 20  # SciPy's solver, imported where a matching is in doubt: 50 MiB
ALIGNMENT = 64

# Larger blocks gain nothing: Python takes 2 to 4 % of the time of such a block. Smaller blocks would fit
# second-level caches, and cost more time in Python than they save (1 << 16: 20 % of a merge).
TARGET_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class ArenaNeed:
    """What one tensor asks of an arena."""

    n_rows: int
    n_cols: int
    fixed_bytes: int
    row_bytes: int  # per row of one block: stored rows and working memory
    cached_row_bytes: int  # per row of every block in memory: its decoded inputs
    surveyed: bool  # there are several passes, so caching blocks saves reads

    def at(self, rows: int, blocks: int = 1) -> int:
        """Bytes for blocks of so many rows, of which so many are in memory."""
        return self.fixed_bytes + rows * (self.row_bytes + blocks * self.cached_row_bytes)

    def wanted_rows(self) -> int:
        """Rows of a block; more memory would not make it higher."""
        return min(self.n_rows, max(1, TARGET_ELEMENTS // max(1, self.n_cols)))

    def most_useful(self) -> int:
        """Bytes that are enough; more would gain nothing."""
        rows = self.wanted_rows()
        return self.at(rows, -(-self.n_rows // max(1, rows)) if self.surveyed else 1)


def floor_bytes() -> int:
    """Return the part of a budget that is not free for a merge in this process.

    It is `FLOOR_BYTES` in a process that is no larger than that, as the command's is: its plans are always
    the same. In a larger one it is the resident memory now, and what a merge loads.
    """
    resident = read_process().rss
    return FLOOR_BYTES if resident <= FLOOR_BYTES else resident + GROWTH_BYTES


def rows_in_arena(need: ArenaNeed, arena_bytes: int) -> int:
    """Return the block height for one tensor, or 0 where not even one row fits."""
    fits = (arena_bytes - need.fixed_bytes) // max(1, need.row_bytes + need.cached_row_bytes)
    return max(0, min(fits, need.wanted_rows()))


def blocks_in_arena(need: ArenaNeed, rows: int, arena_bytes: int) -> int:
    """Return how many blocks of so many rows stay in memory; one place more is for all others."""
    if not (need.surveyed and rows):
        return 0
    left = arena_bytes - need.fixed_bytes - rows * need.row_bytes
    places, n_blocks = left // max(1, rows * need.cached_row_bytes), -(-need.n_rows // rows)
    return n_blocks if places >= n_blocks else max(0, places - 1)


def workers_on(n_elements: int, total: int, workers: int) -> int:
    """Choose how many workers make one tensor, of a model of `total` elements: one or all.

    All workers make a tensor that is more than an eighth of one worker's part of the model. One worker
    alone would finish it long after the others. Smaller tensors keep all workers busy, largest first.
    """
    enough = n_elements >= 4 * workers * TARGET_ELEMENTS  # for some blocks each
    return workers if enough and 8 * workers * n_elements > total else 1


def divide_budget(
    needs: list[ArenaNeed],
    budget: int,
    threads: int,
    header_bytes: int,
    *,
    before_arenas: int = 0,
    reading: int = 0,
    floor: int = FLOOR_BYTES,
) -> tuple[int, int]:
    """Choose the number of workers and the size of their arenas.

    Parameters
    ----------
    needs : list of ArenaNeed
        One per tensor.
    budget : int
        Bytes for the whole process.
    threads : int
        Workers at most.
    header_bytes : int
        What the models' metadata takes.
    before_arenas : int
        Bytes of work that is over before the arenas are made.
    reading : int
        Bytes that each worker takes to read, beside its arena.
    floor : int
        From `floor_bytes`.

    Returns
    -------
    workers, arena_bytes : int
        At least one worker; arenas are no larger than any tensor can use.

    Raises
    ------
    BudgetError
        The budget does not hold one worker with blocks of one row.
    """
    fixed = floor + header_bytes
    beside = WORKER_BYTES + reading
    least = max((need.at(1) for need in needs), default=0) + beside
    useful = max((need.most_useful() for need in needs), default=0)
    if fixed + max(least, before_arenas) > budget:
        is_large = floor > FLOOR_BYTES
        needed = fixed + max(least, before_arenas) + (RETRY_BYTES if is_large else 0)
        needed = -(-needed // MIB) * MIB
        holds = f", as this process holds {format_size(floor - GROWTH_BYTES)} already"
        raise BudgetError(
            f"a budget of {format_size(budget)} is too small for this merge"
            f"{holds if is_large else ''}; the smallest that works is --memory {needed // MIB}MiB",
            needed=needed,
            budget=budget,
        )
    workers = max(1, min(threads, (budget - fixed) // least, max(1, len(needs))))
    arena = (budget - fixed) // workers - beside
    return workers, min(arena, useful)


class Arena:
    """One worker's memory. Arrays are taken from front to back, and all are given back at once."""

    def __init__(self, n_bytes: int) -> None:
        self._raw = np.empty(n_bytes + ALIGNMENT, np.uint8)
        self._start = -self._raw.ctypes.data % ALIGNMENT
        self._used = 0

    def reset(self) -> None:
        """Give everything back."""
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[np.generic]:
        """Take an aligned, C-contiguous, uninitialised array."""
        n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        start = self._start + self._used
        self._used += aligned(n_bytes)
        assert start + n_bytes <= self._raw.size, "the plan asked for too small an arena"
        return self._raw[start : start + n_bytes].view(dtype).reshape(shape)


def aligned(n_bytes: int) -> int:
    """Round up to what `Arena.take` consumes for an array."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
