"""Permutes attention heads along the columns of a block, in place."""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def mix_columns(indptr_i64, indices_i64, weights_f32, row_f32, x_f32):
    """Replace every column by a weighted sum of columns: `new[:, j] = sum_p w[p] * old[:, idx[p]]`.

    A permutation has one index and weight 1 per column, and changes no value; a soft
    alignment has several (the barycentric projection of optimal transport, Imfeld et al. 2024).

    Parameters
    ----------
    indptr_i64 : (n_cols + 1,) int64
        entries of column j are indptr[j] .. indptr[j + 1]
    indices_i64 : (nnz,) int64
        old columns
    weights_f32 : (nnz,) float32
        their weights
    row_f32 : (n_cols,) float32
        overwritten with nothing of use
    x_f32 : (n_rows * n_cols,) float32
        block of rows; overwritten
    """
    n_cols = row_f32.size
    for start in range(0, x_f32.size, n_cols):
        row = x_f32[start : start + n_cols]
        for j in range(n_cols):
            row_f32[j] = row[j]
        for j in range(n_cols):
            first = indptr_i64[j]
            total = weights_f32[first] * row_f32[indices_i64[first]]
            for p in range(first + 1, indptr_i64[j + 1]):
                total += weights_f32[p] * row_f32[indices_i64[p]]
            row[j] = np.float32(total)
