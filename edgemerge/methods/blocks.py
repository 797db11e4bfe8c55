"""What methods see of a tensor: blocks of float32 rows, and nothing of files, types or threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgemerge.methods.shared_tensor import GroupThread
from edgemerge.types import Float32, Float64, TensorJob

__all__ = ["ELECTION_TILE", "NON_FINITE", "RANK_BINS", "SUM_LANES"]
__all__ += ["Block", "BlockStream", "least_overflow", "model_weights"]

NON_FINITE = 0x7F800000  # bits of infinity: everything from here on is infinite or NaN
HALF_OVERFLOW = 0x477FF000  # bits of 65520, the least magnitude that float16 rounds to infinity

# What working memory is measured by.
SUM_LANES = 32  # LANES of kernels/gram.py and kernels/norms.py: partial sums of one row
ELECTION_TILE = 1024  # TILE of kernels/ties.py
RANK_BINS = 2048  # RADIX of kernels/della.py


@dataclass(slots=True)
class Block:
    """Some rows of one tensor, decoded; the arrays are the worker's own and may be overwritten."""

    number: int
    first: int  # flat index of the first element
    n_cols: int
    base: Float32 | None  # (n,)
    experts: Float32  # (n_experts, n); task vectors for methods that keep them
    is_pruned: bool = False  # in place, by an earlier pass
    n_overflows: int | None = None  # results that the output cannot hold, if counted

    @property
    def n_rows(self) -> int:
        """Rows in the block."""
        return int(self.experts.shape[1]) // self.n_cols


class BlockStream(Protocol):
    """The blocks of one tensor, as often as asked for, and working memory beside them."""

    job: TensorJob
    seed: int
    group: GroupThread  # this worker's place among those who make the tensor
    layer_sum: Float64 | None  # what `Method.measure` returned, summed over the tensor's layer

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks that this worker makes, in row order, the same in every pass.

        Some are held from one pass to the next and come as they were left; the others are loaded again.
        So only the last pass overwrites blocks, but for pruning, which a block remembers.
        """

    def take(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[np.generic]:
        """Return working memory, uninitialised, that lives as long as the stream."""


def model_weights(job: TensorJob) -> Float64:
    """Return the recipe's weight of every expert, (n_experts,)."""
    return np.array([expert.settings["weight"] for expert in job.experts], np.float64)


def least_overflow(dtype: str) -> int:
    """Return the bits of the least magnitude, as float32, that a type cannot hold."""
    return NON_FINITE if dtype in ("F32", "BF16") else HALF_OVERFLOW
