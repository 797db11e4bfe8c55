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

NON_FINITE = 0x7F800000  # bits of infinity; larger bits are NaN
HALF_OVERFLOW = 0x477FF000  # bits of 65520, the least magnitude that float16 rounds to infinity

# What working memory is measured by.
SUM_LANES = 32  # LANES of kernels/gram.py and kernels/norms.py: partial sums of one row
ELECTION_TILE = 1024  # TILE of kernels/ties.py
RANK_BINS = 2048  # RADIX of kernels/della.py


@dataclass(slots=True)
class Block:
    """Some rows of one tensor, decoded. The arrays belong to the worker, who may overwrite them."""

    number: int
    first: int  # flat index of the first element
    n_cols: int
    base: Float32 | None  # (n,)
    experts: Float32  # (n_experts, n); task vectors where `Method.takes_deltas`
    is_pruned: bool = False  # an earlier pass pruned `experts` in place
    n_overflows: int | None = None  # results that the output type cannot hold; None: not counted

    @property
    def n_rows(self) -> int:
        """Rows in the block."""
        return int(self.experts.shape[1]) // self.n_cols


class BlockStream(Protocol):
    """The blocks of one tensor, for as many passes as needed, and working memory."""

    job: TensorJob
    seed: int
    group: GroupThread  # this worker among those that make the tensor
    layer_sum: Float64 | None  # what `Method.measure` returned, summed over the tensor's layer

    def blocks(self) -> Iterator[Block]:
        """Yield this worker's blocks in row order, the same in every pass.

        A cached block comes as the last pass left it; any other is loaded again. So only the last pass may
        overwrite blocks. Pruning is the exception: `Block.is_pruned` records it.
        """

    def sample(self, n_rows: int) -> Iterator[Block]:
        """Yield so many rows, evenly spaced over the tensor, each a block; all rows where there are fewer.

        Every worker of a group gets the same rows. Take all of them, before the first pass.
        """

    def read_importances(self, k: int, out_f32: Float32) -> None:
        """Fill (n_matrices, n_cols) with the importances of expert k's columns, in the output's order.

        Only where all of `TensorJob.experts` have an `imatrix`.
        """

    def take(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[np.generic]:
        """Return uninitialised working memory that lives as long as the stream."""


def model_weights(job: TensorJob) -> Float64:
    """Return the recipe's weight of every expert, (n_experts,)."""
    return np.array([expert.settings["weight"] for expert in job.experts], np.float64)


def least_overflow(dtype: str) -> int:
    """Return the bits of the least magnitude, as float32, that a type cannot hold."""
    return NON_FINITE if dtype in ("F32", "BF16") else HALF_OVERFLOW
