"""Permutes attention heads along the columns of a block in place, and rotates their values."""

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


@njit(cache=True, nogil=True)
def rotate_columns(rotations_f32, per_rotation, first, row_f32, x_f32):
    """Rotate equal parts of every row in place: `new[p] = sum_q R[p, q] * old[q]`, summed in float64.

    Parameters
    ----------
    rotations_f32 : (n, length, length) float32
        R of each KV group
    per_rotation : int
        consecutive parts that one R rotates: the query heads of a group, or 1 for a bias
    first : int
        column where the first part begins; columns before and after all parts stay
    row_f32 : (n_cols,) float32
        overwritten with nothing of use
    x_f32 : (n_rows * n_cols,) float32
        block of rows; overwritten
    """
    n_cols = row_f32.size
    length = rotations_f32.shape[1]
    for start in range(first, x_f32.size, n_cols):
        at = start
        for group in range(rotations_f32.shape[0]):
            for _ in range(per_rotation):
                for p in range(length):
                    total = 0.0
                    for q in range(length):
                        total += np.float64(rotations_f32[group, p, q]) * np.float64(x_f32[at + q])
                    row_f32[p] = np.float32(total)
                for p in range(length):
                    x_f32[at + p] = row_f32[p]
                at += length


@njit(cache=True, nogil=True)
def add_rotated_rows(rotation_f32, first_new, first_old, x_f32, out_f32):
    """Add old rows, one by one in order, to rotated rows: `out[i] += R[first_new + i, first_old + k] * x[k]`.

    Parameters
    ----------
    rotation_f32 : (length, length) float32
        R of a KV group
    first_new, first_old : int
        place in the group of the first row of `out_f32` and of `x_f32`
    x_f32 : (n_old, n_cols) float32
        some rows of the group
    out_f32 : (n_new, n_cols) float32
        running sums, added to
    """
    for k in range(x_f32.shape[0]):
        for i in range(out_f32.shape[0]):
            weight = rotation_f32[first_new + i, first_old + k]
            for j in range(x_f32.shape[1]):
                out_f32[i, j] += weight * x_f32[k, j]
