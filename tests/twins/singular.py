"""Slow, obviously right NumPy twins of the methods that work on singular directions, in float64.

`np.linalg.svd` where all directions are wanted. Where only the first are, the same block power iteration on
whole matrices, as its result depends on its start and its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.twins.methods import subtract

Float64 = NDArray[np.float64]

STEPS = 2
WORD = (1 << 64) - 1


def signs(n_rows: int, n_cols: int) -> Float64:
    """The top bit of splitmix64 of 1, 2, 3, ...: 1 where it is 0, and -1."""
    found = []
    for i in range(1, n_rows * n_cols + 1):
        z = i * 0x9E3779B97F4A7C15 & WORD
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
        found.append(-1.0 if z >> 63 else 1.0)
    return np.array(found).reshape(n_rows, n_cols)


def first_directions(matrix: Float64, rank: int) -> tuple[Float64, Float64, Float64]:
    """Left vectors, singular values and right vectors, as rows: the first, as far as some steps find them."""
    rank, n_cols = min(rank, *matrix.shape), matrix.shape[1]
    vectors = signs(rank, n_cols) if rank < n_cols else np.eye(n_cols)
    for _ in range(STEPS):
        vectors = np.linalg.qr((vectors @ matrix.T @ matrix).T)[0].T
    left, values, turn = np.linalg.svd(matrix @ vectors.T, full_matrices=False)
    real = values > 1e-5 * values[0]
    return left.T[real], values[real], (turn @ vectors)[real]


def calibrate(
    merged: Float64, changes: Sequence[Float64], rank: int, least: float | None = None
) -> Float64:
    """Li et al. 2026 (arXiv 2602.05536), for the first directions: how often each is counted divides it.

    Projections are floored at `least`, by default 1 / n, and their mean is weighed by the squares of the
    experts' responses.
    """
    least = 1 / len(changes) if least is None else least
    result = merged.copy()
    for u, sigma, v in zip(*first_directions(merged, rank), strict=True):
        responses = [u @ change for change in changes]
        squares = [float(response @ response) for response in responses]
        if sum(squares) > 0:
            counts = [
                sigma * float(v @ response) / square if square else 0.0
                for response, square in zip(responses, squares, strict=True)
            ]
            count = np.average(np.maximum(counts, least), weights=squares)
            result += (1 / count - 1) * sigma * np.outer(u, v)
    return result


def orthonormal(vectors: Float64) -> Float64:
    """The nearest orthonormal rows: P Q' of the singular value decomposition P S Q'."""
    left, values, right = np.linalg.svd(vectors, full_matrices=False)
    real = values**2 > 1e-6 * values[0] ** 2
    return (left[:, real]) @ right[real]


def whole(base: NDArray[Any], models: Sequence[NDArray[Any]]) -> list[Float64]:
    return [subtract(base, x).astype(np.float64) for x in models]


def tsv(
    base: NDArray[Any],
    models: Sequence[NDArray[Any]],
    weights: Sequence[float],
    rank: int,
    scale: float = 1.0,
) -> Float64:
    """Gargiulo et al. 2025 (arXiv 2412.00081): first directions, made orthogonal; the rest is added."""
    changes = [x.reshape(-1, base.shape[-1]) for x in whole(base, models)]
    left: list[Float64] = []
    right: list[Float64] = []
    sizes: list[Float64] = []
    merged = np.zeros_like(changes[0])
    for weight, change in zip(weights, changes, strict=True):
        u, values, v = first_directions(change, rank)
        merged += weight * (change - (u.T * values) @ v)
        left, right, sizes = [*left, *u], [*right, *v], [*sizes, *(weight * values)]
    merged += (orthonormal(np.array(left)).T * sizes) @ orthonormal(np.array(right))
    return base.astype(np.float64) + scale * merged.reshape(base.shape)


def added(
    base: NDArray[Any], models: Sequence[NDArray[Any]], weights: Sequence[float]
) -> tuple[list[Float64], Float64]:
    """All changes as matrices, and their weighted sum."""
    changes = [x.reshape(-1, base.shape[-1]) for x in whole(base, models)]
    merged = np.sum([w * change for w, change in zip(weights, changes, strict=True)], axis=0)
    return changes, merged


def iso_c(
    base: NDArray[Any],
    models: Sequence[NDArray[Any]],
    weights: Sequence[float],
    rank: int,
    scale: float = 1.0,
) -> Float64:
    """Marczak et al. 2025 (arXiv 2502.04959): the first singular values of the sum become their mean."""
    _, merged = added(base, models, weights)
    u, values, v = first_directions(merged, rank)
    merged = merged + (u.T * (values.mean() - values)) @ v
    return base.astype(np.float64) + scale * merged.reshape(base.shape)


def iso_cts(
    base: NDArray[Any],
    models: Sequence[NDArray[Any]],
    weights: Sequence[float],
    rank: int,
    scale: float = 1.0,
) -> Float64:
    """The same, with directions of each change beside the common ones; all orthogonal, one singular value."""
    changes, merged = added(base, models, weights)
    rank = min(rank, *merged.shape)
    own = max(1, round((rank - int(0.8 * rank)) / len(changes)))
    if rank <= len(changes):
        return base.astype(np.float64) + scale * merged.reshape(base.shape)
    u, values, v = first_directions(merged, rank - len(changes) * own)
    left, right, sizes = [*u], [*v], [*values]
    merged = merged - (u.T * values) @ v
    for weight, change in zip(weights, changes, strict=True):
        ours, own_values, own_v = first_directions(change - change @ v.T @ v, own)
        merged = merged - weight * (ours.T * own_values) @ own_v
        left, right, sizes = [*left, *ours], [*right, *own_v], [*sizes, *own_values]
    flat = np.mean(sizes) * orthonormal(np.array(left)).T @ orthonormal(np.array(right))
    return base.astype(np.float64) + scale * (merged + flat).reshape(base.shape)


TWINS = {"tsv": tsv, "iso_c": iso_c, "iso_cts": iso_cts}
