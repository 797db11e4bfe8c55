"""Singular value calibration: what experts have in common is not counted twice (Li et al. 2026).

The paper, arXiv 2602.05536, corrects a merged change of any method. For a matrix with the merged change
`M = U S V'` and experts' changes `D_i`, direction k has the responses `a = u_k' M` and `a_i = u_k' D_i`. How
often M counts expert i along it is the projection `s_i = <a, a_i> / <a_i, a_i>`. Singular value k is divided
by the mean over experts of `max(s_i, 1 / n_experts)`. So a direction that n experts share has s_i = n in a
sum, and is counted once; a direction of one expert has s_i = 1, and stays.

We differ in two points. The first `svc_rank` directions are calibrated, and the rest of M stays. The mean
weighs experts by `<a_i, a_i>`, where the paper weighs them alike: the projection of an expert that hardly
responds is the quotient of two small numbers, and may be anything. `D_i` is what the method keeps of an
expert, such as a trimmed task vector. Embeddings, output heads and vectors stay as merged, as in the authors'
program. A stack of experts counts as one tall matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from edgemerge.methods.blocks import SUM_LANES, Block, BlockStream
from edgemerge.methods.directions import (
    DIRECTION_KERNELS,
    POWER_STEPS,
    Directions,
    direction_memory,
    eigenvectors,
    has_directions,
)
from edgemerge.methods.method import Described, WorkingMemory
from edgemerge.methods.parameters import Parameter
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64, TensorJob

__all__ = ["CALIBRATING", "CALIBRATION_PASSES", "SVC", "SVC_RANK"]
__all__ += ["calibrate", "calibration_memory", "is_calibrated", "rescale"]

gram, linear = KernelFile("gram"), KernelFile("linear")

SVC = Parameter("svc", "count what experts have in common once, not once for each", False, "switch")
SVC_RANK = Parameter("svc_rank", "directions of a matrix that `svc` looks at", 16.0, "count")
CALIBRATION_PASSES = POWER_STEPS + 1  # and one to merge
CALIBRATING = (*DIRECTION_KERNELS, "gram.row_dots", "linear.add_scaled")


def is_calibrated(tensor: Described) -> bool:
    """Tell whether a tensor is a matrix whose merged change is calibrated."""
    settings = tensor.settings
    return bool(settings["svc"]) and float(settings["svc_rank"]) > 0 and has_directions(tensor)


def calibrate(
    stream: BlockStream, merged: Callable[[Block], Float32], factors: Float32, scale: float
) -> Iterator[tuple[Block, Float32]]:
    """Yield the blocks of `base + scale * calibrated change`.

    Parameters
    ----------
    stream : BlockStream
        Of task vectors.
    merged : callable
        Takes a block, returns its part of the merged change, (n,) float32, which may be overwritten. It
        leaves in `Block.experts` what is merged of each expert.
    factors : (n_experts,) float32
        What enlarges this.
    scale : float
        lambda of the recipe.
    """
    job = stream.job
    directions = Directions(stream, [int(float(job.settings["svc_rank"]))])
    directions.find(lambda block: [merged(block)])
    changes = _measure(stream, directions, merged, factors.astype(np.float64))
    yield from rescale(stream, directions, merged, changes, scale)


def rescale(
    stream: BlockStream,
    directions: Directions,
    merged: Callable[[Block], Float32],
    changes: Float32,
    scale: float,
) -> Iterator[tuple[Block, Float32]]:
    """Yield the blocks of `base + scale * change` with other singular values.

    Parameters
    ----------
    stream, merged, scale
        As of `calibrate`.
    directions : Directions
        Singular ones of the merged change.
    changes : (rank,) float32
        What each singular value gains, in parts of it.
    """
    for block in stream.blocks():
        assert block.base is not None
        change = merged(block)
        by_rows = directions.transposed(directions.project(0, change))
        by_rows *= changes
        directions.add_vectors(directions.vectors, by_rows, change)
        linear.add_scaled(change, scale, block.base)
        yield block, block.base


def _measure(
    stream: BlockStream,
    directions: Directions,
    merged: Callable[[Block], Float32],
    factors: Float64,
) -> Float32:
    """Turn the vectors into singular ones. Return by how much of its part each direction changes, (rank,)."""
    (rank, n_cols), n_experts = directions.vectors.shape, len(stream.job.experts)
    grams = stream.group.row_sum((rank, rank))
    sums = [directions.sum_of_rows(0) for _ in range(n_experts)]
    responses = stream.take((n_experts, rank, n_cols), np.float32).view(np.float32)
    for block in stream.blocks():
        found = directions.project(0, merged(block))
        directions.add_gram(grams, block, found)
        for total, expert in zip(sums, block.experts, strict=True):
            directions.add(total, block, found, expert)
    squares, rotation = eigenvectors(grams.total())
    vectors, lanes = directions.vectors, stream.take((SUM_LANES,), np.float64)
    directions.turn(rotation, vectors)
    dots = np.empty((n_experts, rank, 3))
    for total, response, own in zip(sums, responses, dots, strict=True):
        total.copy_total(response)
        directions.turn(rotation, response)
        gram.row_dots(vectors.reshape(-1), response.reshape(-1), n_cols, lanes, own)
    dots[..., 1] *= factors[:, None]
    dots[..., 2] *= (factors * factors)[:, None]
    return (1.0 / _counts(squares, dots) - 1.0).astype(np.float32)


def _counts(squares: Float64, dots: Float64) -> Float64:
    """Tell how often each direction is counted, (rank,); 1 where no expert responds.

    Parameters
    ----------
    squares : (rank,) float64
        Squared singular values of the merged change.
    dots : (n_experts, rank, 3) float64
        Of a right singular vector v and the response b = M v times an expert, as `gram.row_dots` has them:
        v.v, v.b and b.b. With u = M v / sigma, `<a, a_i>` is v.b and `<a_i, a_i>` is b.b / sigma^2.
    """
    own = np.zeros(dots.shape[:2])
    np.divide(dots[..., 2], squares, out=own, where=squares > 0.0)
    counted, total = np.zeros(len(squares)), np.zeros(len(squares))
    for product, square in zip(dots[..., 1], own, strict=True):
        counted += np.maximum(product, square / len(dots))
        total += square
    result = np.ones(len(squares))
    np.divide(counted, total, out=result, where=total > 0.0)
    return result


def calibration_memory(job: TensorJob) -> WorkingMemory:
    """Count the bytes of directions, and of responses and their sums."""
    rank = int(float(job.settings["svc_rank"]))
    fixed, per_row = direction_memory(job, [rank])
    responses = 4 * min(rank, job.out.n_rows, job.n_cols) * job.n_cols * len(job.experts)
    return WorkingMemory(fixed + 2 * responses + 8 * SUM_LANES, per_row)
