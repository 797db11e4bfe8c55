"""The hierarchical method's second half: task vectors weighted by their cosine similarity.

Its first half, the alignment of attention heads by sparse optimal transport, happens where experts are read
(`edgemerge.alignment.reordering`), so that every method can use it. Here the Gram matrix of the aligned
task vectors is measured over a tensor, a transformer block or each row, and `edgemerge.methods.weighting`
turns it into one factor per expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgemerge.methods.blocks import SUM_LANES, Block, BlockStream, model_weights
from edgemerge.methods.weighting import factors
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64

__all__ = ["hierarchical_blocks", "survey_gram"]

gram, linear = KernelFile("gram"), KernelFile("linear")


def survey_gram(stream: BlockStream) -> Float64:
    """Measure the Gram matrix of a tensor's task vectors, (n_experts, n_experts)."""
    n_experts = len(stream.job.experts)
    total = stream.team.row_sum((n_experts, n_experts))
    grams, lanes = _row_memory(stream)
    for block in stream.blocks():
        rows = grams[: block.n_rows]
        gram.row_grams(block.experts, block.n_cols, lanes, rows)
        total.add(block.number, rows)
    return total.total()


def hierarchical_blocks(
    stream: BlockStream, shared_gram: Float64 | None = None
) -> Iterator[tuple[Block, Float32]]:
    """Yield the blocks of `base + lambda * sum_m u_m delta_m`.

    Parameters
    ----------
    stream : BlockStream
        Of one tensor, with task vectors.
    shared_gram : (n_experts, n_experts) float64, optional
        Measured over a whole transformer block (scope `block`); else the tensor's own is surveyed.
    """
    job = stream.job
    weighting, scale = str(job.settings["weighting"]), float(job.settings["lambda"])
    weights = model_weights(job)
    if job.settings["scope"] == "row":
        yield from _row_blocks(stream, weighting, scale)
        return
    measured = survey_gram(stream) if shared_gram is None else shared_gram
    shares = factors(measured, weights, weighting).astype(np.float32)
    for block in stream.blocks():
        assert block.base is not None
        linear.add_deltas(shares, np.ones_like(shares), scale, block.experts, block.base)
        yield block, block.base


def _row_blocks(
    stream: BlockStream, weighting: str, scale: float
) -> Iterator[tuple[Block, Float32]]:
    """Every row with factors of its own: one read, since a row is always whole."""
    weights = model_weights(stream.job)
    grams, lanes = _row_memory(stream)
    for block in stream.blocks():
        rows = grams[: block.n_rows]
        gram.row_grams(block.experts, block.n_cols, lanes, rows)
        shares = factors(rows, weights, weighting).astype(np.float32)
        assert block.base is not None
        gram.combine_rows(shares, block.n_cols, block.experts)
        linear.add_scaled(block.experts[0], scale, block.base)
        yield block, block.base


def _row_memory(stream: BlockStream) -> tuple[Float64, Float64]:
    """Return memory for the Gram matrices of a block's rows, and for the partial sums of one row."""
    n_experts = len(stream.job.experts)
    shape = (max(1, stream.job.rows_per_block), n_experts, n_experts)
    grams, lanes = stream.take(shape, np.float64), stream.take((SUM_LANES,), np.float64)
    return grams.view(np.float64), lanes.view(np.float64)
