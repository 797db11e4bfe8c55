"""Kernels of importances against plain loops in the stated order, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.kernels import importance
from tests.kernels.test_gram import KINDS, numbers

Float32 = NDArray[np.float32]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_rows", "n_cols"), [(1, 1), (7, 5), (40, 33), (3, 4097)])
def test_squares_are_added_row_by_row(kind: str, n_rows: int, n_cols: int) -> None:
    rng = np.random.default_rng(n_rows)
    x, sums = numbers(kind, (n_rows, n_cols)), numbers("normal", (3, n_cols), 1) ** 2
    rows, targets = rng.integers(0, n_rows, 2 * n_rows), rng.integers(0, 3, 2 * n_rows)
    expected = sums.copy()
    with np.errstate(all="ignore"):
        for row, target in zip(rows, targets, strict=True):
            expected[target] += x[row] * x[row]
    importance.add_squares(x, rows, targets, sums)
    assert np.array_equal(sums, expected)


def changes_in_order(
    shares: Float32, first: int, n_matrix_rows: int, scale: float, delta: Float32, base: Float32
) -> Float32:
    """Add changes with the factors of each row's matrix, model after model, in float32."""
    n_models, n_cols = shares.shape[1:]
    delta = delta.reshape(n_models, -1, n_cols)
    matrices = (first + np.arange(delta.shape[1])) // n_matrix_rows
    total = shares[matrices, 0] * delta[0]
    for k in range(1, n_models):
        total = total + shares[matrices, k] * delta[k]
    return base + np.float32(scale) * total.ravel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [0, 2, 5])
@pytest.mark.parametrize(("n_models", "n_cols"), [(1, 1), (2, 31), (3, 40)])
def test_changes_have_the_factors_of_their_column_and_matrix(
    n_models: int, n_cols: int, first: int, kind: str
) -> None:
    n_matrix_rows, n_rows = 3, 4
    shares = numbers("normal", (3, n_models, n_cols), 0) ** 2
    delta, base = (
        numbers(kind, (n_models, n_rows * n_cols), 1),
        numbers(kind, (n_rows * n_cols,), 2),
    )
    with np.errstate(all="ignore"):
        expected = changes_in_order(shares, first, n_matrix_rows, 0.3, delta, base)
    importance.add_changes(shares, first, n_matrix_rows, 0.3, delta, base)
    assert np.array_equal(base, expected)
