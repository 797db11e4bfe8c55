"""TSV-Merge, Iso-C and Iso-CTS: merged changes whose first singular directions are made anew.

The papers take all directions of a matrix, or a part 1 / n_experts of each expert's. Here `rank` is how many.
What a matrix is beside them is added as it is, where the papers drop it; on small experts that is better, and
takes a fraction of the time. A stack of experts counts as one tall matrix. Vectors are averaged, embeddings
and output heads are added.

TSV-M (Gargiulo et al. 2025)
    The first directions of all changes stand side by side, and become the nearest orthonormal ones.
Iso-C (Marczak et al. 2025)
    The first singular values of the sum of changes become their mean.
Iso-CTS
    A fifth of the directions is the experts' own: the first of what each change is beside the common ones.
    All become orthonormal, with one singular value. The paper takes the common part off on the left. Here it
    comes off on the right, where it can be done row by row. A matrix that has no more rows or columns than
    there are experts has no room for all of this, and is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from edgemerge.errors import RecipeError
from edgemerge.methods.blocks import SUM_LANES, Block, BlockStream, model_weights
from edgemerge.methods.calibration import (
    SVC,
    SVC_RANK,
    calibrate,
    calibrating_kernels,
    calibration_memory,
    calibration_passes,
    is_calibrated,
    rescale,
)
from edgemerge.methods.copies import Copies, copies_memory
from edgemerge.methods.directions import (
    DIRECTION_KERNELS,
    POWER_STEPS,
    Directions,
    direction_memory,
    eigenvectors,
    has_directions,
    multiply,
)
from edgemerge.methods.method import Described, Method, WorkingMemory, always
from edgemerge.methods.parameters import LAMBDA, RANK, WEIGHT
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64, TensorJob

__all__ = ["SPECTRAL"]

gram, linear = KernelFile("gram"), KernelFile("linear")

COMMON = 0.8  # of the rank: the common space of Iso-CTS
SAME = 1e-6  # eigenvalue of a Gram matrix of unit vectors, of the largest, up to which two are one


# -- TSV-Merge -------------------------------------------------------------------------------------


def _tsv(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    weights, scale = _weights(stream.job), float(stream.job.settings["lambda"])
    directions = Directions(stream, _tsv_ranks(stream.job))
    directions.find(lambda block: block.experts)
    grams = directions.survey(lambda block: block.experts)
    mixing = _orthogonalise(stream, directions, grams, weights, flat=False)
    copies = Copies(stream)

    def merged(block: Block) -> Float32:
        change = _add_up(block, weights, copies)
        _mix(directions, mixing, block.experts, change)
        return change

    if is_calibrated(stream.job):
        yield from calibrate(stream, merged, scale, may_grow=False)
        return
    for block in stream.blocks():
        assert block.base is not None
        linear.add_scaled(merged(block), scale, block.base)
        yield block, block.base


def _tsv_ranks(job: Described) -> list[int]:
    return [_rank(job)] * len(job.experts)


# -- Iso-C and Iso-CTS -----------------------------------------------------------------------------


def _iso_c(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    copies, weights = Copies(stream), _weights(stream.job)

    def total(block: Block) -> Float32:
        return _add_up(block, weights, copies)

    directions = Directions(stream, [_rank(stream.job)])
    directions.find(lambda block: [total(block)])
    grams = directions.survey(lambda block: [total(block)])
    squares, rotation = eigenvectors(grams)
    directions.turn(rotation, directions.vectors)
    sizes, changes = np.sqrt(squares), np.zeros_like(squares)
    np.divide(_mean(sizes) - sizes, sizes, out=changes, where=sizes > 0.0)
    scale = float(stream.job.settings["lambda"])
    yield from rescale(stream, directions, total, changes.astype(np.float32), scale)


def _iso_cts(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    copies, weights = Copies(stream), _weights(stream.job)
    ranks = _iso_cts_ranks(stream.job)
    directions = Directions(stream, ranks)
    directions.find(lambda block: [_add_up(block, weights, copies)], [0])

    def residuals(block: Block) -> Float32:
        own = copies.of(block)
        for rows in own:
            directions.take_off(directions.project(0, rows), directions.of(0), rows)
        return own

    directions.find(residuals, range(1, len(ranks)))

    def pieces(block: Block) -> list[Float32]:
        return [_add_up(block, weights, copies), *residuals(block)]

    grams = directions.survey(pieces)
    factors = np.concatenate([np.ones(1, np.float32), weights])
    mixing = _orthogonalise(stream, directions, grams, factors, flat=True)
    for block in stream.blocks():
        assert block.base is not None
        change, *own = pieces(block)
        _mix(directions, mixing, [change, *own], change)
        linear.add_scaled(change, float(stream.job.settings["lambda"]), block.base)
        yield block, block.base


def _iso_cts_ranks(job: Described) -> list[int]:
    """Split the rank: four fifths for what is common, the rest evenly for the experts, one each at least."""
    rank, n_experts = _rank(job), len(job.experts)
    own = max(1, round((rank - int(COMMON * rank)) / n_experts))
    return [rank - n_experts * own, *[own] * n_experts]


# -- what they have in common ----------------------------------------------------------------------


def _add_up(block: Block, weights: Float32, copies: Copies) -> Float32:
    """Return the weighted sum of the changes of a block, which stay."""
    own, total = copies.of(block), copies.zeros(block)
    linear.weighted_sum(weights, own)
    total[:] = own[0]
    return total


def _orthogonalise(
    stream: BlockStream, directions: Directions, grams: Float64, weights: Float32, *, flat: bool
) -> Float64:
    """Turn the vectors into singular ones, and return what makes their products orthogonal directions.

    With left and right singular vectors of all matrices side by side, U and V, and singular values s, that
    part of the matrices becomes `U (U'U)^-1/2 s (V'V)^-1/2 V'`.

    Parameters
    ----------
    grams : (n_vectors, n_vectors) float64
        From `_survey`.
    weights : (n_matrices,) float32
        Of the matrices.
    flat : bool
        Whether all singular values become their mean.

    Returns
    -------
    (n_vectors, n_vectors) float64
        Between the rows' products with the turned vectors and these: the change of the sum of the matrices.
    """
    turned, squares = np.zeros_like(grams), np.zeros(len(grams))
    own = np.zeros(len(grams))
    for i, part in enumerate(directions.parts):
        squares[part], turned[part, part] = eigenvectors(np.ascontiguousarray(grams[part, part]))
        directions.turn(turned[part, part], directions.of(i))
        own[part] = weights[i]
    sizes, inverse = np.sqrt(squares), np.zeros_like(squares)
    np.divide(1.0, sizes, out=inverse, where=squares > 0.0)
    scaled = turned * inverse[:, None]
    right = np.empty((1, len(grams), len(grams)))
    lanes = stream.take((SUM_LANES,), np.float64)
    gram.row_grams(directions.vectors, directions.vectors.shape[1], lanes, right)
    sizes = np.where(squares > 0.0, _mean(sizes), 0.0) if flat else sizes * own
    whitened = multiply(
        _inverse_root(multiply(scaled, grams, scaled.T)) * sizes, _inverse_root(right[0])
    )
    return whitened * inverse[:, None] - np.diag(own)


def _mean(sizes: Float64) -> float:
    """Return the mean of those that are not 0."""
    return math.fsum(sizes.tolist()) / max(1, int(np.count_nonzero(sizes)))


def _inverse_root(matrix: Float64) -> Float64:
    """Return a Gram matrix to the power of -1/2, in the directions that it has."""
    values, vectors = eigenvectors(matrix)
    roots = np.zeros_like(values)
    np.divide(1.0, np.sqrt(values), out=roots, where=values > SAME * values[0])
    return multiply(vectors.T * roots, vectors)


def _mix(
    directions: Directions,
    mixing: Float64,
    matrices: Sequence[Float32] | Float32,
    change: Float32,
) -> None:
    """Add `products @ mixing @ vectors` to the change of a block."""
    mixed = directions.mix(directions.project_all(matrices), mixing)
    directions.add_vectors(directions.vectors, mixed, change)


def _add(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    """Yield the blocks of a tensor that is no matrix: the sum of changes, of vectors their mean."""
    weights, scale = _weights(stream.job), float(stream.job.settings["lambda"])
    if len(stream.job.out.shape) == 1:
        scale /= len(weights)
    for block in stream.blocks():
        assert block.base is not None
        linear.weighted_sum(weights, block.experts)
        linear.add_scaled(block.experts[0], scale, block.base)
        yield block, block.base


def _weights(job: TensorJob) -> Float32:
    return model_weights(job).astype(np.float32)


def _rank(tensor: Described) -> int:
    """Return how many directions of a matrix are changed: what is asked for, or all that it has."""
    return min(int(float(tensor.settings["rank"])), tensor.experts[0].spec.n_rows, tensor.n_cols)


# -- records ---------------------------------------------------------------------------------------

_UNDONE = (
    "svc would set anew the singular values that {} makes equal, and undo it; "
    "leave svc out, or use it with tsv or task_arithmetic"
)


def _method(
    name: str,
    summary: str,
    source: str,
    blocks: Callable[[BlockStream], Iterator[tuple[Block, Float32]]],
    ranks: Callable[[Described], list[int]],
    *,
    has_own: bool = False,
    flattens: bool = True,
) -> Method:
    """Make a record of what a method does to matrices and of the ranks of its parts.

    `has_own`: there are directions of each expert's own, which are searched after the common ones.
    `flattens`: singular values become their mean, so that a calibration would undo what the method does.
    """

    def applies(tensor: Described) -> bool:
        return has_directions(tensor) and _rank(tensor) > (len(tensor.experts) if has_own else 0)

    def all_blocks(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
        return blocks(stream) if applies(stream.job) else _add(stream)

    def passes(tensor: Described) -> int:
        steps = (1 + has_own) * POWER_STEPS
        return steps + 2 + calibration_passes(tensor) if applies(tensor) else 1

    def memory(job: TensorJob) -> WorkingMemory:
        if not applies(job):
            return WorkingMemory()
        fixed, per_row = direction_memory(job, ranks(job))
        more = calibration_memory(job, copies=False)
        return WorkingMemory(
            fixed + 8 * SUM_LANES + more.fixed,
            per_row + copies_memory(job) + more.per_row,
        )

    def decomposes(tensor: Described) -> Sequence[int]:
        if not applies(tensor):
            return ()
        own = ranks(tensor)
        return own if len(own) == 1 else (*own, sum(own), sum(own))

    def check(tensor: Described) -> None:
        n_experts, rank = len(tensor.experts), float(tensor.settings["rank"])
        if has_own and has_directions(tensor) and 0 < rank <= n_experts:
            raise RecipeError(
                f"{name} takes a rank above its {n_experts} expert{'s' * (n_experts > 1)}, each of which has "
                f"a direction of its own; give rank: {n_experts + 1} or more",
                field="rank",
            )
        if is_calibrated(tensor) and not rank:
            raise RecipeError(
                f"with rank: 0 {name} only adds, and has nothing for svc to calibrate; "
                "use task_arithmetic with svc",
                field="rank",
            )

    return Method(
        name,
        summary,
        source,
        parameters=(WEIGHT.by_default(1.0), RANK, LAMBDA, *(() if flattens else (SVC, SVC_RANK))),
        kernels=(
            "linear.subtract",
            "linear.weighted_sum",
            "linear.add_scaled",
            "gram.row_grams",
            *DIRECTION_KERNELS,
        ),
        blocks=all_blocks,
        needs_base=True,
        passes=passes,
        memory=memory,
        decomposes=decomposes,
        check=check,
        more_kernels=calibrating_kernels,
        refuses={SVC.name: _UNDONE.format(name)} if flattens else {},
        takes_deltas=always,
    )


SPECTRAL = (
    _method(
        "tsv",
        "make the first singular directions of all changes orthogonal, then add",
        "arXiv 2412.00081",
        _tsv,
        _tsv_ranks,
        flattens=False,
    ),
    _method(
        "iso_c",
        "add the changes, then make their first singular values equal",
        "arXiv 2502.04959",
        _iso_c,
        lambda job: [_rank(job)],
    ),
    _method(
        "iso_cts",
        "the same, with some directions of each change's own among them",
        "arXiv 2502.04959",
        _iso_cts,
        _iso_cts_ranks,
        has_own=True,
    ),
)
