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
    n_rows = delta_f32.size // n_cols
    together = n_rows // 4 * 4
    for row in range(0, together, 4):
        # An addition waits for the one before it: four rows side by side take 0.6 of one after the other.
        at = row * n_cols
        d_0, m_0 = delta_f32[at : at + n_cols], mask_u8[at : at + n_cols]
        at += n_cols
        d_1, m_1 = delta_f32[at : at + n_cols], mask_u8[at : at + n_cols]
        at += n_cols
        d_2, m_2 = delta_f32[at : at + n_cols], mask_u8[at : at + n_cols]
        at += n_cols
        d_3, m_3 = delta_f32[at : at + n_cols], mask_u8[at : at + n_cols]
        all_0 = all_1 = all_2 = all_3 = 0.0
        kept_0 = kept_1 = kept_2 = kept_3 = 0.0
        for i in range(n_cols):
            x_0 = np.float64(abs(d_0[i]))
            x_1 = np.float64(abs(d_1[i]))
            x_2 = np.float64(abs(d_2[i]))
            x_3 = np.float64(abs(d_3[i]))
            all_0 += x_0
            all_1 += x_1
            all_2 += x_2
            all_3 += x_3
            kept_0 += x_0 if m_0[i] else 0.0
            kept_1 += x_1 if m_1[i] else 0.0
            kept_2 += x_2 if m_2[i] else 0.0
            kept_3 += x_3 if m_3[i] else 0.0
        norms_f64[row, 0], norms_f64[row, 1] = all_0, kept_0
        norms_f64[row + 1, 0], norms_f64[row + 1, 1] = all_1, kept_1
        norms_f64[row + 2, 0], norms_f64[row + 2, 1] = all_2, kept_2
        norms_f64[row + 3, 0], norms_f64[row + 3, 1] = all_3, kept_3
    for row in range(together, n_rows):
        everything = 0.0
        kept = 0.0
        for i in range(row * n_cols, (row + 1) * n_cols):
            magnitude = np.float64(abs(delta_f32[i]))
            everything += magnitude
            kept += magnitude if mask_u8[i] else 0.0
        norms_f64[row, 0], norms_f64[row, 1] = everything, kept


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
