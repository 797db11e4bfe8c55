"""Singular value calibration: what experts have in common is not counted twice (Li et al. 2026).

The paper, arXiv 2602.05536, corrects a merged change of any method. For a matrix with the merged change
`M = U S V'` and experts' changes `D_i`, direction k has the responses `a = u_k' M` and `a_i = u_k' D_i`. How
often M counts expert i along it is the projection `s_i = <a, a_i> / <a_i, a_i>`. Singular value k is divided
by the mean over experts of `max(s_i, 1 / n_experts)`. So a direction that n experts share has s_i = n in a
sum, and is counted once; a direction of one expert has s_i = 1, and stays.

For TSV-Merge, which makes directions anew so that none is counted twice, the authors' program has 1 in the
place of 1 / n_experts: a singular value never grows. So have we.

Iso-C and Iso-CTS are left out. What they give a direction as its singular value, calibration divides out
again: the quotient of the value and its projections does not depend on it. And where all values are the same,
the directions are not defined.

We differ in two points. The first `svc_rank` directions are calibrated, and the rest of M stays. The mean
weighs experts by `<a_i, a_i>`, where the paper weighs them alike: the projection of an expert that hardly
responds is the quotient of two small numbers, and may be anything. `D_i` is what the method keeps of an
expert, such as a trimmed task vector. Embeddings, output heads and vectors stay as merged, as in the authors'
program. A stack of experts counts as one tall matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from edgemerge.methods.blocks import SUM_LANES, Block, BlockStream
from edgemerge.methods.copies import copies_memory
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

__all__ = ["SVC", "SVC_RANK", "calibrate", "calibrating_kernels", "calibration_memory"]
__all__ += ["calibration_passes", "calibration_sides", "is_calibrated", "rescale"]

gram, linear = KernelFile("gram"), KernelFile("linear")

SVC = Parameter("svc", "count what experts have in common once, not once for each", False, "switch")
SVC_RANK = Parameter(
    "svc_rank",
    "directions of a matrix that `svc` looks at",
    16.0,
    "count",
    needs="svc",
    span=(1.0, 64.0),
)


def is_calibrated(tensor: Described) -> bool:
    """Tell whether a tensor is a matrix whose merged change is calibrated; without `svc` none is."""
    settings = tensor.settings
    return bool(settings.get("svc")) and float(settings["svc_rank"]) > 0 and has_directions(tensor)


def calibration_passes(tensor: Described) -> int:
    """Count the passes over a tensor that its calibration takes before the one that merges."""
    return POWER_STEPS + 1 if is_calibrated(tensor) else 0


def calibration_sides(tensor: Described) -> Sequence[int]:
    """Return the side of the symmetric matrix that a tensor's calibration decomposes, if there is one."""
    if not is_calibrated(tensor):
        return ()
    rank = int(float(tensor.settings["svc_rank"]))
    return (min(rank, tensor.experts[0].spec.n_rows, tensor.n_cols),)


def calibrating_kernels(tensor: Described) -> Sequence[str]:
    """Name the kernels that the calibration of a tensor calls."""
    kernels = (*DIRECTION_KERNELS, "gram.row_dots", "linear.add_scaled")
    return kernels if is_calibrated(tensor) else ()


def calibrate(
    stream: BlockStream,
    merged: Callable[[Block], Float32],
    scale: float,
    factors: Float32 | None = None,
    *,
    may_grow: bool = True,
) -> Iterator[tuple[Block, Float32]]:
    """Yield the blocks of `base + scale * calibrated change`.

    Parameters
    ----------
    stream : BlockStream
        Of task vectors.
    merged : callable
        Takes a block, returns its part of the merged change, (n,) float32, which may be overwritten. It
        leaves in `Block.experts` what is merged of each expert.
    scale : float
        lambda of the recipe.
    factors : (n_experts,) float32, optional
        What enlarges what is merged of each expert; by default nothing does.
    may_grow : bool
        Whether a direction that is counted less than once is enlarged, up to n_experts times.
    """
    job = stream.job
    factors = np.ones(len(job.experts), np.float32) if factors is None else factors
    directions = Directions(stream, [int(float(job.settings["svc_rank"]))])
    directions.find(lambda block: [merged(block)])
    most = len(job.experts) if may_grow else 1
    changes = _measure(stream, directions, merged, factors.astype(np.float64), most)
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
    most: int,
) -> Float32:
    """Turn the vectors into singular ones. Return by how much of its part each direction changes, (rank,)."""
    (rank, n_cols), n_experts = directions.vectors.shape, len(stream.job.experts)
    grams = stream.group.row_sum((rank, rank))
    responses = list(stream.take((n_experts, rank, n_cols), np.float32).view(np.float32))
    sums = [directions.sum_of_rows(response) for response in responses]
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
        total.copy_to(response)
        directions.turn(rotation, response)
        gram.row_dots(vectors.reshape(-1), response.reshape(-1), n_cols, lanes, own)
    dots[..., 1] *= factors[:, None]
    dots[..., 2] *= (factors * factors)[:, None]
    return (1.0 / _counts(squares, dots, most) - 1.0).astype(np.float32)


def _counts(squares: Float64, dots: Float64, most: int) -> Float64:
    """Tell how often each direction is counted, (rank,); 1 where no expert responds.

    Parameters
    ----------
    squares : (rank,) float64
        Squared singular values of the merged change.
    dots : (n_experts, rank, 3) float64
        Of a right singular vector v and the response b = M v times an expert, as `gram.row_dots` has them:
        v.v, v.b and b.b. With u = M v / sigma, `<a, a_i>` is v.b and `<a_i, a_i>` is b.b / sigma^2.
    most : int
        By how much a singular value may be multiplied.
    """
    own = np.zeros(dots.shape[:2])
    np.divide(dots[..., 2], squares, out=own, where=squares > 0.0)
    counted, total = np.zeros(len(squares)), np.zeros(len(squares))
    for product, square in zip(dots[..., 1], own, strict=True):
        counted += np.maximum(product, square / most)
        total += square
    result = np.ones(len(squares))
    np.divide(counted, total, out=result, where=total > 0.0)
    return result


def calibration_memory(job: TensorJob, *, copies: bool = True) -> WorkingMemory:
    """Count the bytes of directions, of responses, and of `Copies` unless there are some."""
    if not is_calibrated(job):
        return WorkingMemory()
    rank = int(float(job.settings["svc_rank"]))
    fixed, per_row = direction_memory(job, [rank])
    responses = 4 * min(rank, job.out.n_rows, job.n_cols) * job.n_cols * len(job.experts)
    per_row += copies_memory(job) if copies else 0
    return WorkingMemory(fixed + responses + 8 * SUM_LANES, per_row)
