"""ResMerge (arXiv 2606.02252), for experts that were trained by reinforcement.

A change D_i is split into a head, its first `rank` singular directions, and a residual: `D_i = H_i + R_i`.
Heads know much, but contradict each other. So the residuals are merged, and of the heads only a little is
added, as far as they agree. With the residuals' directions `q_i = R_i / |R_i|`, and s their mean cosine over
pairs,

    q = sum_i q_i,  c = |q| / n_experts,  beta = 1 - 0.3 ((s + 1) / 2 + (c + 1) / 2) / 2
    A = c^beta mean_i |R_i| q / |q|
    M = A + rho S |A| mean_i H_i / |mean_i H_i|

S is the mean of `max(0, cosine)` over pairs of heads. Residuals that do not agree, c <= 1 / sqrt(n_experts),
are averaged. Outside attention and feed-forward networks beta is 1. Vectors, embeddings and output heads are
averaged.

The formulas are those of the authors' program, which decomposes every matrix and adds small numbers before
it divides. Here block power iteration finds the heads. It looks for more directions than a head has, as the
first of many are found well. The Gram matrices of residuals and of heads then say what A and M need.

A stack of experts counts as one tall matrix. A matrix that has no more directions than a head is averaged.
A change that is a head alone has no residual. Where none has one, M is 0, as in the program.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from edgemerge.errors import RecipeError
from edgemerge.methods.blocks import SUM_LANES, Block, BlockStream
from edgemerge.methods.copies import Copies, copies_memory
from edgemerge.methods.directions import (
    DIRECTION_KERNELS,
    POWER_STEPS,
    Directions,
    direction_memory,
    eigenvectors,
    has_directions,
)
from edgemerge.methods.grams import GRAM_KERNELS, GramRows, gram_memory
from edgemerge.methods.method import Described, Method, WorkingMemory, always
from edgemerge.methods.parameters import LAMBDA, RANK, Parameter
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64, TensorJob

__all__ = ["RESMERGE", "backbone", "head_factor"]

gram, linear = KernelFile("gram"), KernelFile("linear")

SEARCHED = 15  # directions beside the head's; with 7, some heads of flat matrices are missed
LEAST_BETA, MOST_BETA = 0.7, 1.0
NO_RESIDUAL = 1e-10  # squared norm, of the change's, up to which a residual is rounding


def _merge(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    job = stream.job
    scale, n_experts = float(job.settings["lambda"]), len(job.experts)
    if not _has_residuals(job):
        weights = np.full(n_experts, 1.0 / n_experts, np.float32)
        for block in stream.blocks():
            assert block.base is not None
            linear.weighted_sum(weights, block.experts)
            linear.add_scaled(block.experts[0], scale, block.base)
            yield block, block.base
        return
    heads = _find_heads(stream)
    residual_gram, head_gram = _survey(stream, heads)
    factors = backbone(residual_gram, is_known=_is_known(job))
    size = math.sqrt(max(0.0, _quadratic(factors, residual_gram)))
    factor = float(job.settings["rho"]) * size * head_factor(head_gram)
    weights = np.array(factors, np.float32)
    changes = np.repeat([factor - own for own in factors], len(heads.of(0))).astype(np.float32)
    for block in stream.blocks():
        assert block.base is not None
        by_rows = heads.transposed(heads.project_all(block.experts))
        by_rows *= changes
        linear.weighted_sum(weights, block.experts)
        heads.add_vectors(heads.vectors, by_rows, block.experts[0])
        linear.add_scaled(block.experts[0], scale, block.base)
        yield block, block.base


def _find_heads(stream: BlockStream) -> Directions:
    """Return the first right singular vectors of every change."""
    n_experts = len(stream.job.experts)
    searched = Directions(stream, [_rank(stream.job) + SEARCHED] * n_experts)
    searched.find(lambda block: block.experts)
    grams = searched.survey(lambda block: block.experts)
    heads = Directions(stream, [_rank(stream.job)] * n_experts)
    for i, part in enumerate(searched.parts):
        _, rotation = eigenvectors(np.ascontiguousarray(grams[part, part]))
        searched.turn(rotation, searched.of(i))
        heads.of(i)[:] = searched.of(i)[: len(heads.of(i))]
    return heads


def _survey(stream: BlockStream, heads: Directions) -> tuple[Float64, Float64]:
    """Return the Gram matrices of residuals and of heads, each (n_experts, n_experts)."""
    n_experts, n_vectors = len(stream.job.experts), len(heads.vectors)
    residuals = stream.group.row_sum((n_experts, n_experts))
    products = stream.group.row_sum((n_vectors, n_vectors))
    copies, rows = Copies(stream), GramRows(stream)
    for block in stream.blocks():
        own = copies.of(block)
        found = heads.project_all(own)
        heads.add_gram(products, block, found)
        for i, part in enumerate(heads.parts):
            heads.take_off(found[part], heads.of(i), own[i])
        residuals.add(block.number, rows.of(block, own))
    right = np.empty((1, n_vectors, n_vectors))
    lanes = stream.take((SUM_LANES,), np.float64)
    gram.row_grams(heads.vectors, heads.vectors.shape[1], lanes, right)
    # <H_i, H_j> = sum over vectors v of i and w of j of (D_i v . D_j w) (v . w)
    both = products.total() * right[0]
    head_gram = np.array([[math.fsum(both[a, b].flat) for b in heads.parts] for a in heads.parts])
    residual_gram = residuals.total().copy()
    squares = np.diagonal(residual_gram)
    lost = squares <= NO_RESIDUAL * (squares + np.diagonal(head_gram))
    residual_gram[lost] = 0.0
    residual_gram[:, lost] = 0.0
    return residual_gram, head_gram


def backbone(grams: Float64, *, is_known: bool) -> list[float]:
    """Return the factor of each residual in A, 0 where there is none.

    Parameters
    ----------
    grams : (n_experts, n_experts) float64
        Gram matrix of the residuals.
    is_known : bool
        Whether the tensor belongs to attention or to a feed-forward network.
    """
    n_experts = len(grams)
    norms = np.sqrt(np.diagonal(grams)).tolist()
    inverse = [1.0 / norm if norm else 0.0 for norm in norms]
    length = math.sqrt(max(0.0, _quadratic(inverse, grams)))
    coherence = min(1.0, length / n_experts)
    if coherence <= 1.0 / math.sqrt(n_experts):
        return [1.0 / n_experts if norm else 0.0 for norm in norms]
    score = (_mean_cosine(grams) + 1.0 + coherence + 1.0) / 4.0 if is_known else 0.0
    beta = MOST_BETA - (MOST_BETA - LEAST_BETA) * min(1.0, score)
    size = coherence**beta * math.fsum(norms) / n_experts
    return [size / length * own for own in inverse]


def head_factor(grams: Float64) -> float:
    """Return the factor of the sum of heads that makes its norm their agreement S.

    Parameters
    ----------
    grams : (n_experts, n_experts) float64
        Gram matrix of the heads.
    """
    active = np.diagonal(grams) > 0
    found = grams[np.ix_(active, active)]
    size = math.sqrt(max(0.0, math.fsum(found.flat)))
    return _mean_cosine(found, least=0.0) / size if size else 0.0


def _mean_cosine(grams: Float64, least: float = -1.0) -> float:
    """Return the mean cosine of all pairs, none below `least`; 1 where there is no pair."""
    norms = np.sqrt(np.diagonal(grams)).tolist()
    cosines = []
    for i in range(len(norms)):
        for j in range(i):
            both = norms[i] * norms[j]
            cosines.append(min(1.0, max(least, float(grams[i, j]) / both)) if both else 0.0)
    return math.fsum(cosines) / len(cosines) if cosines else 1.0


def _quadratic(factors: Sequence[float], grams: Float64) -> float:
    """Return the squared norm of a sum of vectors, each times its factor."""
    rows = zip(factors, grams.tolist(), strict=True)
    return math.fsum(a * b * x for a, row in rows for b, x in zip(factors, row, strict=True))


def _rank(tensor: Described) -> int:
    return int(float(tensor.settings["rank"]))


def _has_residuals(tensor: Described) -> bool:
    """Tell whether a tensor is a matrix with more directions than a head has."""
    most = min(tensor.experts[0].spec.n_rows, tensor.n_cols)
    return has_directions(tensor) and _rank(tensor) < most


def _is_known(tensor: Described) -> bool:
    return any(part.startswith(("attn_", "ffn_")) for part in tensor.name.split("."))


# -- the record ------------------------------------------------------------------------------------


def _passes(tensor: Described) -> int:
    return POWER_STEPS + 3 if _has_residuals(tensor) else 1


def _memory(job: TensorJob) -> WorkingMemory:
    if not _has_residuals(job):
        return WorkingMemory()
    n_experts = len(job.experts)
    searched = direction_memory(job, [_rank(job) + SEARCHED] * n_experts)
    parts = (searched, direction_memory(job, [_rank(job)] * n_experts), gram_memory(job))
    fixed = 8 * SUM_LANES + sum(part.fixed for part in parts)
    return WorkingMemory(fixed, copies_memory(job) + sum(part.per_row for part in parts))


def _decomposes(tensor: Described) -> Sequence[int]:
    if not _has_residuals(tensor):
        return ()
    searched = min(_rank(tensor) + SEARCHED, tensor.experts[0].spec.n_rows, tensor.n_cols)
    return (searched,) * len(tensor.experts)


def _check(tensor: Described) -> None:
    if not _rank(tensor):
        raise RecipeError(
            "resmerge takes a rank from 1 on, as a head has a direction", field="rank"
        )
    if float(tensor.settings["rho"]) < 0:
        raise RecipeError("rho must not be below 0, as it is a part of a norm", field="rho")


RESMERGE = Method(
    "resmerge",
    "merge changes without their first directions, of which little is added, as far as models agree",
    "Sun et al. 2026, arXiv 2606.02252",
    parameters=(
        RANK.by_default(1.0),
        Parameter(
            "rho",
            "norm of the first directions where models agree, in parts of the rest's",
            0.2,
            span=(0.0, 1.0),
        ),
        LAMBDA,
    ),
    kernels=(
        "linear.subtract",
        "linear.weighted_sum",
        "linear.add_scaled",
        *GRAM_KERNELS,
        *DIRECTION_KERNELS,
    ),
    blocks=_merge,
    needs_base=True,
    passes=_passes,
    memory=_memory,
    decomposes=_decomposes,
    check=_check,
    takes_deltas=always,
)
