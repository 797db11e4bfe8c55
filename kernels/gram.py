"""Gram matrices: all that cosine weighting and spherical interpolation (Shoemake 1985) need to know."""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import dot


@njit(cache=True, nogil=True)
def row_grams(x_f32, n_cols, lanes_f64, grams_f64):
    """Dot products of every pair of models, row by row.

    Each row is summed on its own in float64, so no result depends on how a tensor is cut into blocks of
    rows: column i into partial sum i % LANES, and these in halves, each onto the other.

    Parameters
    ----------
    x_f32 : (n_models, n_rows * n_cols) float32
        the same rows of several models
    n_cols : int
        elements in one row
    lanes_f64 : (LANES,) float64
        overwritten with nothing of use
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
                total = dot(left, right, lanes_f64)
                grams_f64[row, a, b] = total
                grams_f64[row, b, a] = total


@njit(cache=True, nogil=True)
def row_dots(a_f32, b_f32, n_cols, lanes_f64, dots_f64):
    """Dot products `a.a`, `a.b` and `b.b`, row by row, added as in `row_grams`.

    Parameters
    ----------
    a_f32, b_f32 : (n_rows * n_cols,) float32
        the same rows of two models
    n_cols : int
        elements in one row
    lanes_f64 : (LANES,) float64
        overwritten with nothing of use
    dots_f64 : (n_rows, 3) float64
        written
    """
    for row in range(a_f32.size // n_cols):
        a = a_f32[row * n_cols : (row + 1) * n_cols]
        b = b_f32[row * n_cols : (row + 1) * n_cols]
        dots_f64[row, 0] = dot(a, a, lanes_f64)
        dots_f64[row, 1] = dot(a, b, lanes_f64)
        dots_f64[row, 2] = dot(b, b, lanes_f64)


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


@njit(cache=True, nogil=True)
def add_column_dots(a_f32, b_f32, dots_f64):
    """Add the dot products `a.a`, `a.b` and `b.b` of every column, row after row.

    Parameters
    ----------
    a_f32, b_f32 : (n_rows * n_cols,) float32
        the same rows of two models
    dots_f64 : (3, n_cols) float64
        running sums, added to
    """
    n_cols = dots_f64.shape[1]
    for row in range(a_f32.size // n_cols):
        a = a_f32[row * n_cols : (row + 1) * n_cols]
        b = b_f32[row * n_cols : (row + 1) * n_cols]
        for i in range(n_cols):
            left = np.float64(a[i])
            right = np.float64(b[i])
            dots_f64[0, i] += left * left
            dots_f64[1, i] += left * right
            dots_f64[2, i] += right * right


@njit(cache=True, nogil=True)
def combine_columns(factors_f32, x_f32):
    """Sum models with factors of their own for each column: `x[0] = sum_k factors[k, column] * x[k]`.

    Parameters
    ----------
    factors_f32 : (n_models, n_cols) float32
        one factor per model and column
    x_f32 : (n_models, n_rows * n_cols) float32
        weights or task vectors; row 0 is overwritten by the sum
    """
    n_models, n_cols = factors_f32.shape
    for row in range(x_f32.shape[1] // n_cols):
        start = row * n_cols
        total = x_f32[0, start : start + n_cols]
        for i in range(n_cols):
            total[i] *= factors_f32[0, i]
        for k in range(1, n_models):
            model = x_f32[k, start : start + n_cols]
            for i in range(n_cols):
                total[i] += factors_f32[k, i] * model[i]
