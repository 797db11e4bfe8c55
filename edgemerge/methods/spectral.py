"""TSV-Merge, Iso-C and Iso-CTS: merged changes made of singular directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from edgemerge.methods.blocks import SUM_LANES, Block, BlockStream, model_weights
from edgemerge.methods.calibration import rescale
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
from edgemerge.methods.parameters import LAMBDA, WEIGHT, Parameter
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64, TensorJob

__all__ = ["SPECTRAL"]

gram, linear = KernelFile("gram"), KernelFile("linear")

SAME = 1e-6  # eigenvalue of a Gram matrix of unit vectors, of the largest, up to which two are one

RANK = Parameter("rank", "first singular directions of a matrix that are changed", 16.0, "count")


# -- TSV-Merge -------------------------------------------------------------------------------------


def _tsv(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    if not _is_spectral(stream.job):
        yield from _add(stream)
        return
    directions = Directions(stream, len(stream.job.experts), _rank(stream.job))
    directions.find(lambda block: block.experts)
    n_vectors = len(directions.vectors) * directions.rank
    grams = stream.group.row_sum((n_vectors, n_vectors))
    for block in stream.blocks():
        directions.add_gram(grams, block, directions.project_all(block))
    mixing = _orthogonal(stream, directions, grams.total())
    yield from _mix(stream, directions, mixing)


def _orthogonal(stream: BlockStream, directions: Directions, grams: Float64) -> Float64:
    """Turn the vectors into singular ones, and return what takes rows' products to orthogonal directions.

    With singular vectors of all experts side by side, U = D V' / s, the merged change is
    `U (U'U)^-1/2 s (V V')^-1/2 V`; the rest of each expert's change stays.

    Parameters
    ----------
    grams : (n_vectors, n_vectors) float64
        Of the products of all changes with their vectors.

    Returns
    -------
    (n_vectors, n_vectors) float64
        To be multiplied by the rows' products from the left, and by the turned vectors from the right.
    """
    vectors, rank = directions.vectors, directions.rank
    turned, squares = np.zeros_like(grams), np.zeros(len(grams))
    for i, own in enumerate(vectors):
        part = slice(i * rank, (i + 1) * rank)
        squares[part], turned[part, part] = eigenvectors(np.ascontiguousarray(grams[part, part]))
        directions.turn(turned[part, part], own)
    sizes, inverse = np.sqrt(squares), np.zeros_like(squares)
    np.divide(1.0, sizes, out=inverse, where=squares > 0.0)
    scaled = turned * inverse[:, None]
    right = np.empty((1, len(grams), len(grams)))
    lanes = stream.take((SUM_LANES,), np.float64)
    gram.row_grams(vectors.reshape(len(grams), -1), vectors.shape[2], lanes, right)
    weights = np.repeat(model_weights(stream.job), rank)
    whitened = multiply(
        _inverse_root(multiply(scaled, grams, scaled.T)) * (sizes * weights),
        _inverse_root(right[0]),
    )
    return whitened * inverse[:, None] - np.diag(weights)


def _inverse_root(matrix: Float64) -> Float64:
    """Return a Gram matrix to the power of -1/2, in the directions that it has."""
    values, vectors = eigenvectors(matrix)
    roots = np.zeros_like(values)
    np.divide(1.0, np.sqrt(values), out=roots, where=values > SAME * values[0])
    return multiply(vectors.T * roots, vectors)


# -- Iso-C -----------------------------------------------------------------------------------------


def _iso_c(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    if not _is_spectral(stream.job):
        yield from _add(stream)
        return
    merged = _summer(stream)
    directions = Directions(stream, 1, _rank(stream.job))
    directions.find(lambda block: [merged(block)])
    grams = stream.group.row_sum((directions.rank, directions.rank))
    for block in stream.blocks():
        directions.add_gram(grams, block, directions.project(0, merged(block)))
    squares, rotation = eigenvectors(grams.total())
    directions.turn(rotation, directions.vectors[0])
    sizes, changes = np.sqrt(squares), np.zeros_like(squares)
    mean = math.fsum(sizes.tolist()) / max(1, int(np.count_nonzero(sizes)))
    np.divide(mean - sizes, sizes, out=changes, where=sizes > 0.0)
    scale = float(stream.job.settings["lambda"])
    yield from rescale(stream, directions, merged, changes.astype(np.float32), scale)


def _summer(stream: BlockStream) -> Callable[[Block], Float32]:
    """Return what adds up the changes of a block, which it leaves as they are."""
    weights = _weights(stream.job)
    n = len(weights) * max(1, stream.job.rows_per_block) * stream.job.n_cols
    copies = stream.take((n,), np.float32).view(np.float32)

    def add(block: Block) -> Float32:
        own = copies[: block.experts.size].reshape(block.experts.shape)
        own[:] = block.experts
        linear.weighted_sum(weights, own)
        return np.asarray(own[0])

    return add


def _iso_c_memory(job: TensorJob) -> WorkingMemory:
    if not _is_spectral(job):
        return WorkingMemory()
    fixed, per_row = direction_memory(job, 1, _rank(job))
    return WorkingMemory(fixed, per_row + 4 * job.n_cols * len(job.experts))


# -- what they have in common ----------------------------------------------------------------------


def _mix(
    stream: BlockStream, directions: Directions, mixing: Float64
) -> Iterator[tuple[Block, Float32]]:
    """Yield the blocks of `base + lambda * (sum of changes + products @ mixing @ vectors)`."""
    weights, scale = _weights(stream.job), float(stream.job.settings["lambda"])
    factors = mixing.astype(np.float32)
    n = len(mixing) * max(1, stream.job.rows_per_block)
    mixed = stream.take((n,), np.float32).view(np.float32)
    for block in stream.blocks():
        assert block.base is not None
        by_rows = directions.transposed(directions.project_all(block))
        own = mixed[: by_rows.size].reshape(by_rows.shape)
        directions.multiply(by_rows, factors, own)
        linear.weighted_sum(weights, block.experts)
        directions.add_vectors(own, block.experts[0])
        linear.add_scaled(block.experts[0], scale, block.base)
        yield block, block.base


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


def _rank(job: TensorJob) -> int:
    return int(float(job.settings["rank"]))


def _is_spectral(tensor: Described) -> bool:
    return has_directions(tensor) and float(tensor.settings["rank"]) > 0


def _passes(tensor: Described) -> int:
    return POWER_STEPS + 2 if _is_spectral(tensor) else 1


def _memory(job: TensorJob) -> WorkingMemory:
    if not _is_spectral(job):
        return WorkingMemory()
    n_matrices = len(job.experts)
    fixed, per_row = direction_memory(job, n_matrices, _rank(job))
    n_vectors = n_matrices * min(_rank(job), job.out.n_rows, job.n_cols)
    return WorkingMemory(fixed + 8 * SUM_LANES, per_row + 4 * n_vectors)


TSV = Method(
    "tsv",
    "make the first singular directions of the changes orthogonal to each other, then add",
    "arXiv 2412.00081",
    parameters=(WEIGHT.by_default(1.0), RANK, LAMBDA),
    kernels=(
        "linear.subtract",
        "linear.weighted_sum",
        "linear.add_scaled",
        "gram.row_grams",
        *DIRECTION_KERNELS,
    ),
    blocks=_tsv,
    needs_base=True,
    passes=_passes,
    memory=_memory,
    takes_deltas=always,
)

ISO_C = Method(
    "iso_c",
    "add the changes, then make their first singular values equal",
    "arXiv 2502.04959",
    parameters=(WEIGHT.by_default(1.0), RANK, LAMBDA),
    kernels=(
        "linear.subtract",
        "linear.weighted_sum",
        "linear.add_scaled",
        *DIRECTION_KERNELS,
    ),
    blocks=_iso_c,
    needs_base=True,
    passes=_passes,
    memory=_iso_c_memory,
    takes_deltas=always,
)

SPECTRAL = (TSV, ISO_C)
