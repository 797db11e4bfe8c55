"""Slow, obviously right NumPy twins of the methods that work on singular directions, in float64.

`np.linalg.svd` where all directions are wanted. Where only the first are, the same block power iteration on
whole matrices, as its result depends on its start and its steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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


def calibrate(merged: Float64, changes: Sequence[Float64], rank: int) -> Float64:
    """Li et al. 2026 (arXiv 2602.05536), for the first directions: how often each is counted divides it.

    Projections are floored at 1 / n, and their mean is weighed by the squares of the experts' responses.
    """
    result = merged.copy()
    for u, sigma, v in zip(*first_directions(merged, rank), strict=True):
        responses = [u @ change for change in changes]
        squares = [float(response @ response) for response in responses]
        if sum(squares) > 0:
            counts = [
                sigma * float(v @ response) / square if square else 0.0
                for response, square in zip(responses, squares, strict=True)
            ]
            count = np.average(np.maximum(counts, 1 / len(changes)), weights=squares)
            result += (1 / count - 1) * sigma * np.outer(u, v)
    return result
