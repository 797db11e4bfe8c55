"""Copies of a block's changes, for passes that must leave the block as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from edgemerge.methods.blocks import Block, BlockStream
from edgemerge.types import Float32, TensorJob

__all__ = ["Adder", "Copies", "copies_memory"]

# Adds what a method merges of changes, (n_experts, n) and overwritten, times a factor to rows, (n,).
Adder: TypeAlias = Callable[[float, Block, Float32, Float32], None]


class Copies:
    """Working memory for a block's changes and for their sum, taken from a stream."""

    def __init__(self, stream: BlockStream) -> None:
        n_experts = len(stream.job.experts)
        n = max(1, stream.job.rows_per_block) * stream.job.n_cols
        self._own = stream.take((n_experts * n,), np.float32).view(np.float32)
        self._sum = stream.take((n,), np.float32).view(np.float32)

    def of(self, block: Block) -> Float32:
        """Return a copy of the changes of a block, (n_experts, n); overwritten by the next."""
        own = self._own[: block.experts.size].reshape(block.experts.shape)
        own[:] = block.experts
        return own

    def zeros(self, block: Block) -> Float32:
        """Return zeros for the sum of a block, (n,); overwritten by the next."""
        total = self._sum[: block.experts.shape[1]]
        total[:] = 0
        return total

    def merge(self, block: Block, add: Adder) -> Float32:
        """Return what a method merges of a block, (n,), without its base or lambda."""
        total = self.zeros(block)
        add(1.0, block, self.of(block), total)
        return total


def copies_memory(job: TensorJob) -> int:
    """Count the bytes of `Copies` for each row of a block."""
    return 4 * job.n_cols * (len(job.experts) + 1)
