"""The three dot products that spherical interpolation needs (Shoemake 1985)."""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def row_dots(a_f32, b_f32, n_cols, dots_f64):
    """Dot products `a.a`, `a.b` and `b.b`, row by row.

    Each row is summed on its own in float64, front to back, so no result depends on how a tensor is
    cut into blocks of rows.

    Parameters
    ----------
    a_f32, b_f32 : (n_rows * n_cols,) float32
        the same rows of two models
    n_cols : int
        elements in one row
    dots_f64 : (n_rows, 3) float64
        written
    """
    for row in range(a_f32.size // n_cols):
        start = row * n_cols
        aa = 0.0
        ab = 0.0
        bb = 0.0
        for i in range(start, start + n_cols):
            a = np.float64(a_f32[i])
            b = np.float64(b_f32[i])
            aa += a * a
            ab += a * b
            bb += b * b
        dots_f64[row, 0] = aa
        dots_f64[row, 1] = ab
        dots_f64[row, 2] = bb
