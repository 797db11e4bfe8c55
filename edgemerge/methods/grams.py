"""Gram matrices of what is merged: of a tensor in one pass, of each row of a block."""

from __future__ import annotations

import numpy as np

from edgemerge.methods.blocks import SUM_LANES, Block, BlockStream
from edgemerge.methods.method import WorkingMemory
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64, TensorJob

__all__ = ["GRAM_KERNELS", "GramRows", "gram_memory", "survey_gram"]

gram = KernelFile("gram")

GRAM_KERNELS = ("gram.row_grams", "gram.add_rows")


class GramRows:
    """Working memory for the Gram matrices of a block's rows, taken from a stream."""

    def __init__(self, stream: BlockStream) -> None:
        n_experts = len(stream.job.experts)
        shape = (max(1, stream.job.rows_per_block), n_experts, n_experts)
        self._grams = stream.take(shape, np.float64).view(np.float64)
        self._lanes = stream.take((SUM_LANES,), np.float64).view(np.float64)

    def of(self, block: Block, experts: Float32 | None = None) -> Float64:
        """Return the Gram matrix of each row, (n_rows, n_experts, n_experts); overwritten by the next.

        `experts` are other values to measure than those of the block, (n_experts, n).
        """
        rows = self._grams[: block.n_rows]
        gram.row_grams(
            block.experts if experts is None else experts, block.n_cols, self._lanes, rows
        )
        return rows


def survey_gram(stream: BlockStream) -> Float64:
    """Measure the Gram matrix of a tensor's experts in one pass, (n_experts, n_experts)."""
    n_experts = len(stream.job.experts)
    total = stream.group.row_sum((n_experts, n_experts))
    rows = GramRows(stream)
    for block in stream.blocks():
        total.add(block.number, rows.of(block))
    return total.total()


def gram_memory(job: TensorJob) -> WorkingMemory:
    """Count the bytes of a sum, and of the matrix of each row."""
    gram_bytes = 8 * len(job.experts) ** 2
    return WorkingMemory(gram_bytes, gram_bytes)
