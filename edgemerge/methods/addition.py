"""Adding task vectors to the base whole, without making them one by one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgemerge.methods.blocks import Block, BlockStream, least_overflow
from edgemerge.native import KernelFile
from edgemerge.types import Float32

__all__ = ["ADDING", "add_whole"]

linear = KernelFile("linear")

ADDING = "linear.add_changes"


def add_whole(
    stream: BlockStream, factors_f32: Float32, scale: float
) -> Iterator[tuple[Block, Float32]]:
    """Yield the blocks of `base + scale * sum_k factors[k] * (expert_k - base)`, in one pass.

    Parameters
    ----------
    stream : BlockStream
        Its blocks have the experts' own values, not task vectors.
    factors_f32 : (n_experts,) float32
        One for each expert.
    scale : float
        Of their sum.
    """
    limit, n_overflows = least_overflow(stream.job.out.dtype), np.empty(1, np.int64)
    for block in stream.blocks():
        assert block.base is not None
        linear.add_changes(factors_f32, scale, block.experts, limit, n_overflows, block.base)
        block.n_overflows = int(n_overflows[0])
        yield block, block.base
