"""From a memory budget to block heights and workers, and the arenas that hold the blocks.

The budget bounds the peak resident memory of the whole process. What is left of it after the
interpreter, Numba and the models' headers is divided among the workers; each owns one arena, allocated
once, and a tensor's blocks are as high as fits in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemerge.errors import BudgetError
from edgemerge.sizes import format_size

__all__ = [
    "FLOOR_BYTES",
    "SOLVER_BYTES",
    "Arena",
    "ArenaNeed",
    "blocks_in_arena",
    "divide_budget",
    "rows_in_arena",
    "workers_on",
]

MIB = 1 << 20

# Interpreter, NumPy, our modules and the machine code of the kernels: 42 to 50 MiB as a rule, and more where
# the page cache holds libraries in large folios, all of which Linux then maps. Numba and LLVM, three times as
# much, never enter the process (`edgemerge.native`). tests/test_budget_rss.py measures it.
FLOOR_BYTES = 64 * MIB
WORKER_BYTES = 1 * MIB  # a thread's stack and its Python objects
SOLVER_BYTES = 72 << 20  # SciPy's solver, imported where a matching is in doubt: 50 MiB
ALIGNMENT = 64

# Blocks beyond this gain nothing: Python's share of a block is then 2 to 4 %. Smaller ones, which would fit
# second-level caches, cost more Python than they save (1 << 16: 20 % of a merge).
TARGET_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class ArenaNeed:
    """What one tensor asks of an arena."""

    n_rows: int
    n_cols: int
    fixed_bytes: int
    row_bytes: int  # per row of the block at hand: stored rows, and what is worked out beside them
    held_row_bytes: int  # per row of every block that is held: its decoded inputs
    surveyed: bool  # read more than once: what is held is not read again

    def at(self, rows: int, blocks: int = 1) -> int:
        """Bytes for blocks of so many rows, of which so many are held."""
        return self.fixed_bytes + rows * (self.row_bytes + blocks * self.held_row_bytes)

    def wanted_rows(self) -> int:
        """Block height that more memory would not improve."""
        return min(self.n_rows, max(1, TARGET_ELEMENTS // max(1, self.n_cols)))

    def most_useful(self) -> int:
        """Bytes that more memory would not improve."""
        rows = self.wanted_rows()
        return self.at(rows, -(-self.n_rows // max(1, rows)) if self.surveyed else 1)


def rows_in_arena(need: ArenaNeed, arena_bytes: int) -> int:
    """Block height for one tensor: a cache-sized piece. Returns 0 where not even one row fits."""
    fits = (arena_bytes - need.fixed_bytes) // max(1, need.row_bytes + need.held_row_bytes)
    return max(0, min(fits, need.wanted_rows()))


def blocks_in_arena(need: ArenaNeed, rows: int, arena_bytes: int) -> int:
    """Blocks of so many rows that are held from one pass to the next; one more passes through."""
    if not (need.surveyed and rows):
        return 0
    left = arena_bytes - need.fixed_bytes - rows * need.row_bytes
    places, n_blocks = left // max(1, rows * need.held_row_bytes), -(-need.n_rows // rows)
    return n_blocks if places >= n_blocks else max(0, places - 1)


def workers_on(n_elements: int, total: int, workers: int) -> int:
    """Choose how many workers make one tensor, of a model of `total` elements: one or all.

    A tensor of more than an eighth of a worker's share is made by all, block by block: alone, its worker
    would be the last to finish. Smaller ones keep all busy by themselves, the largest first.
    """
    enough = n_elements >= 4 * workers * TARGET_ELEMENTS  # for some blocks each
    return workers if enough and 8 * workers * n_elements > total else 1


def divide_budget(
    needs: list[ArenaNeed], budget: int, threads: int, header_bytes: int
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

    Returns
    -------
    workers, arena_bytes : int
        At least one worker; arenas are no larger than any tensor can use.

    Raises
    ------
    BudgetError
        The budget does not hold one worker with blocks of one row.
    """
    fixed = FLOOR_BYTES + header_bytes
    least = max((need.at(1) for need in needs), default=0) + WORKER_BYTES
    useful = max((need.most_useful() for need in needs), default=0)
    if fixed + least > budget:
        needed = -(-(fixed + least) // MIB) * MIB
        raise BudgetError(
            f"a budget of {format_size(budget)} is too small for this merge; "
            f"the smallest that works is --memory {needed // MIB}MiB",
            needed=needed,
            budget=budget,
        )
    workers = max(1, min(threads, (budget - fixed) // least, max(1, len(needs))))
    arena = (budget - fixed) // workers - WORKER_BYTES
    return workers, min(arena, useful)


class Arena:
    """One worker's memory: arrays are carved off front to back and given back all at once."""

    def __init__(self, n_bytes: int) -> None:
        self._raw = np.empty(n_bytes + ALIGNMENT, np.uint8)
        self._start = -self._raw.ctypes.data % ALIGNMENT
        self._used = 0

    def reset(self) -> None:
        """Give everything back."""
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[np.generic]:
        """Carve off an aligned, C-contiguous array; its contents are whatever was there."""
        n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        start = self._start + self._used
        self._used += aligned(n_bytes)
        assert start + n_bytes <= self._raw.size, "the plan asked for too small an arena"
        return self._raw[start : start + n_bytes].view(dtype).reshape(shape)


def aligned(n_bytes: int) -> int:
    """Round up to what `Arena.take` consumes for an array."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
