"""Gram matrices of task vectors: all that cosine weighting and spherical interpolation need to know."""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def row_grams(x_f32, n_cols, grams_f64):
    """Dot products of every pair of models, row by row.

    Each row is summed on its own in float64, front to back, so no result depends on how a tensor is
    cut into blocks of rows.

    Parameters
    ----------
    x_f32 : (n_models, n_rows * n_cols) float32
        the same rows of several models
    n_cols : int
        elements in one row
    grams_f64 : (n_rows, n_models, n_models) float64
        written, both triangles
    """
    n_models, n = x_f32.shape
    for row in range(n // n_cols):
        start = row * n_cols
        for a in range(n_models):
            left = x_f32[a, start : start + n_cols]
            for b in range(a, n_models):
                right = x_f32[b, start : start + n_cols]
                total = 0.0
                for i in range(n_cols):
                    total += np.float64(left[i]) * np.float64(right[i])
                grams_f64[row, a, b] = total
                grams_f64[row, b, a] = total


@njit(cache=True, nogil=True)
def add_rows(rows_f64, sums_f64):
    """Add what some rows contribute to a tensor's sums, in row order.

    Parameters
    ----------
    rows_f64 : (n_rows, n_sums) float64
        of `row_grams`, `row_dots`, `row_norms` and their like
    sums_f64 : (n_sums,) float64
        running sums, added to
    """
    n_rows, n_sums = rows_f64.shape
    for row in range(n_rows):
        for i in range(n_sums):
            sums_f64[i] += rows_f64[row, i]


@njit(cache=True, nogil=True)
def combine_rows(factors_f32, n_cols, x_f32):
    """Sum models with factors of their own for each row: `x[0] = sum_k factors[row, k] * x[k]`.

    Parameters
    ----------
    factors_f32 : (n_rows, n_models) float32
        one factor per row and model
    n_cols : int
        elements in one row
    x_f32 : (n_models, n_rows * n_cols) float32
        weights or task vectors; row 0 is overwritten by the sum
    """
    n_rows, n_models = factors_f32.shape
    for row in range(n_rows):
        start = row * n_cols
        total = x_f32[0, start : start + n_cols]
        factor = factors_f32[row, 0]
        for i in range(n_cols):
            total[i] *= factor
        for k in range(1, n_models):
            model = x_f32[k, start : start + n_cols]
            factor = factors_f32[row, k]
            for i in range(n_cols):
                total[i] += factor * model[i]
