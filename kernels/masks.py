"""What pruning methods share once they know which entries of a task vector to keep."""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def apply_mask(mask_u8, scale, delta_f32):
    """Zero what is dropped and scale what is kept.

    Parameters
    ----------
    mask_u8 : (n,) uint8
        1 keep, 0 drop
    scale : float
        factor of the kept entries; rounded to float32
    delta_f32 : (n,) float32
        task vector, overwritten
    """
    factor = np.float32(scale)
    for i in range(delta_f32.size):
        delta_f32[i] = factor * delta_f32[i] if mask_u8[i] else np.float32(0.0)


@njit(cache=True, nogil=True)
def row_norms(delta_f32, mask_u8, n_cols, norms_f64):
    """L1 norms before and after the mask, row by row.

    Each row is summed on its own in float64, front to back, so no result depends on how a tensor is
    cut into blocks of rows.

    Parameters
    ----------
    delta_f32 : (n_rows * n_cols,) float32
        task vector
    mask_u8 : (n_rows * n_cols,) uint8
        1 keep, 0 drop
    n_cols : int
        elements in one row
    norms_f64 : (n_rows, 2) float64
        written: of all and of the kept entries
    """
    for row in range(delta_f32.size // n_cols):
        start = row * n_cols
        everything = 0.0
        kept = 0.0
        for i in range(start, start + n_cols):
            magnitude = np.float64(abs(delta_f32[i]))
            everything += magnitude
            kept += magnitude if mask_u8[i] else 0.0
        norms_f64[row, 0] = everything
        norms_f64[row, 1] = kept


@njit(cache=True, nogil=True)
def count_beyond(x_f32, limit, count_i64):
    """Count magnitudes of at least the bits `limit`: NaN, infinity, or what F16 lacks.

    Parameters
    ----------
    x_f32 : (n,) float32
        any values
    limit : int
        bits of a non-negative float32; 0x7F800000 counts NaN and infinity
    count_i64 : (1,) int64
        written
    """
    bits = x_f32.view(np.uint32)
    least = np.uint32(limit)
    count = 0
    for i in range(bits.size):
        count += np.int64((bits[i] & np.uint32(0x7FFFFFFF)) >= least)
    count_i64[0] = count
