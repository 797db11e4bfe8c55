"""Weights of a quantiser's errors, from an importance matrix.

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
