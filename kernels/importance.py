"""Importances of columns: sums of squares, weights of a quantiser's errors, and of models' changes.

ggml's encoders with an importance matrix (`quantize_row_*_impl` in ggml-quants.c) weigh the error of a
value x in column j by importance[j] * sqrt(sigma2 + x * x), with sigma2 from the squares of a group of
values: a super-block, or a whole row.
"""

import numpy as np
from numba import njit

LANES = 64


@njit(cache=True, nogil=True, error_model="numpy")
def gather_weighted(x_f32, importance_f32, first, group_len, before, after, tile, weights):
    """Put sub-blocks beside each other, one to a lane, and weigh their values.

    What stands in the unused lanes of a last tile is left there.

    Parameters
    ----------
    x_f32 : (n_rows * n_cols,) float32
        finite values of whole rows
    importance_f32 : (n_cols,) float32
        of the columns; not negative
    first : int
        number of the sub-block that becomes lane 0
    group_len : int
        values that sigma2 is taken of; 0: weights are the importances themselves
    before, after : float32
        sigma2 = before * (sum of squares) / after
    tile, weights : (n * LANES,) float32
        written; n is the length of a sub-block
    """
    n = tile.size // LANES
    sigma2 = np.float32(0.0)
    for lane in range(min(LANES, x_f32.size // n - first)):
        start = n * (first + lane)
        if group_len > 0 and (lane == 0 or start % group_len == 0):
            group = start - start % group_len
            squares = np.float32(0.0)
            for k in range(group, group + group_len):
                squares = np.float32(squares + np.float32(x_f32[k] * x_f32[k]))
            sigma2 = np.float32(np.float32(before * squares) / after)
        column = start % importance_f32.size
        for k in range(n):
            x = x_f32[start + k]
            importance = importance_f32[column + k]
            spread = np.sqrt(np.float32(sigma2 + np.float32(x * x)))
            tile[k * LANES + lane] = x
            weights[k * LANES + lane] = (
                importance if group_len == 0 else np.float32(importance * spread)
            )


@njit(cache=True, nogil=True)
def add_squares(x_f32, rows_i64, targets_i64, sums_f32):
    """Add squares of activations, one row after the other, in float32 as llama-imatrix does.

    `collect_imatrix` of llama.cpp's tools/imatrix/imatrix.cpp: `sums[targets[i]] += x[rows[i]] ** 2`.

    Parameters
    ----------
    x_f32 : (n_rows, n_cols) float32
        what is multiplied with a matrix, or with the experts of a stack
    rows_i64, targets_i64 : (n,) int64
        each row to add, and the sums that it is added to, in this order
    sums_f32 : (n_sums, n_cols) float32
        running sums, added to
    """
    for i in range(rows_i64.size):
        row = x_f32[rows_i64[i]]
        total = sums_f32[targets_i64[i]]
        for k in range(total.size):
            total[k] += row[k] * row[k]


@njit(cache=True, nogil=True)
def add_changes(factors_f32, first_row, n_matrix_rows, scale, delta_f32, base_f32):
    """Move the base along task vectors, with factors for each column of each matrix.

    `base += scale * sum_k factors[matrix, k, column] * delta[k]`

    Parameters
    ----------
    factors_f32 : (n_matrices, n_models, n_cols) float32
        of a stack of matrices, or of one
    first_row : int
        of these rows, counted over the whole stack
    n_matrix_rows : int
        rows of one matrix
    scale : float
        lambda of the recipe; rounded to float32
    delta_f32 : (n_models, n_rows * n_cols) float32
        task vectors; row 0 is overwritten
    base_f32 : (n_rows * n_cols,) float32
        weights of the base; overwritten by the result
    """
    n_models, n_cols = factors_f32.shape[1:]
    factor = np.float32(scale)
    for row in range(base_f32.size // n_cols):
        shares = factors_f32[(first_row + row) // n_matrix_rows]
        start = row * n_cols
        total = delta_f32[0, start : start + n_cols]
        for i in range(n_cols):
            total[i] *= shares[0, i]
        for k in range(1, n_models):
            model = delta_f32[k, start : start + n_cols]
            for i in range(n_cols):
                total[i] += shares[k, i] * model[i]
        base = base_f32[start : start + n_cols]
        for i in range(n_cols):
            base[i] += factor * total[i]
