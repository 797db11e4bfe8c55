"""Kernels of the method covariance against NumPy: sums bit by bit, the solution by its equation."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.kernels import covariance as kernels
from edgemerge.methods.covariance import SUMS

Float32 = NDArray[np.float32]

# Rows, columns, columns of a block.
SHAPES = [
    (1, 1, 1),
    (2, 7, 7),
    (5, 37, 16),
    (33, 40, 9),
    (70, 300, 256),
    (37, 600, 600),
    (66, 530, 264),
]


def numbers(seed: int, *shape: int) -> Float32:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def rubbish(*shape: int) -> Float32:
    return np.full(shape, np.nan, np.float32)


def grams_of(x: Float32, width: int, height: int) -> Float32:
    """The kernel's sums over blocks of rows, upper triangles alone."""
    n_cols = x.shape[1]
    grams = np.zeros((n_cols, width), np.float32)
    for start in range(0, len(x), height):
        packed = rubbish(kernels.ROWS, kernels.TILE)
        kernels.add_grams(x[start : start + height], width, rubbish(SUMS), packed, grams)
    for j in range(n_cols):
        grams[j, : j % width] = 0
        grams[j, n_cols - j // width * width :] = 0
    return grams


@pytest.mark.parametrize(("n_rows", "n_cols", "width"), SHAPES)
def test_products_of_columns_are_added_row_by_row(n_rows: int, n_cols: int, width: int) -> None:
    x = numbers(0, n_rows, n_cols)
    want = np.zeros((n_cols, width), np.float32)
    for row in x:
        for block in range(0, n_cols, width):
            own = row[block : block + width]
            want[block : block + own.size, : own.size] += np.triu(np.outer(own, own))
    for height in (n_rows, 1, 5, 34):
        assert np.array_equal(grams_of(x, width, height), want)


@pytest.mark.parametrize("n_models", [1, 2, 3])
@pytest.mark.parametrize(("n_rows", "n_cols", "width"), SHAPES)
def test_rows_are_combined_column_by_column(
    n_models: int, n_rows: int, n_cols: int, width: int
) -> None:
    x = numbers(1, n_models, n_rows, n_cols)
    factors = numbers(2, n_models, n_cols, width)
    want = x[0].copy()
    for k in range(1, n_models):
        delta = x[k] - x[0]
        for block in range(0, n_cols, width):
            total = want[:, block : block + width]
            for j in range(block, min(block + width, n_cols)):
                total += delta[:, j, None] * factors[k, j, : total.shape[1]]
    kernels.combine(factors, rubbish(SUMS), x)
    assert np.array_equal(x[0], want)


@pytest.mark.parametrize("n_models", [2, 4])
@pytest.mark.parametrize(("n_rows", "n_cols", "width"), SHAPES)
def test_factors_solve_the_least_squares(
    n_models: int, n_rows: int, n_cols: int, width: int
) -> None:
    scales = np.random.default_rng(0).uniform(0.5, 2, n_models)
    ridges = np.random.default_rng(1).uniform(0.05, 0.1, n_models)
    grams = np.stack([grams_of(numbers(k, n_rows, n_cols), width, n_rows) for k in range(n_models)])
    given = grams.astype(np.float64)
    work = np.full((width, width), np.nan)
    sides = np.full((width, kernels.CHUNK), np.nan)
    kernels.solve_factors(scales, ridges, width, work, sides, grams)
    for block in range(0, n_cols, width):
        size = min(width, n_cols - block)
        upper = given[:, block : block + size, :size]
        both = upper + np.swapaxes(np.triu(upper, 1), 1, 2)
        c = scales[:, None, None] * both + ridges[:, None, None] * np.eye(size)
        for k in range(1, n_models):
            want = c[k] @ np.linalg.inv(c.sum(axis=0))
            got = grams[k, block : block + size, :size]
            assert np.abs(got - want).max() <= 1e-6
