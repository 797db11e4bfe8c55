"""Sums and checks over the numbers of a block."""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import LANES, fold_lanes


@njit(cache=True, nogil=True)
def row_norms(delta_f32, n_cols, column, lanes_f64, norms_f64):
    """L1 norms, row by row.

    Each row is summed on its own in float64, so no result depends on how a tensor is cut into blocks of
    rows: column i into partial sum i % LANES, and these in halves, each onto the other.

    Parameters
    ----------
    delta_f32 : (n_rows * n_cols,) float32
        task vector
    n_cols : int
        elements in one row
    column : int
        where to write
    lanes_f64 : (LANES,) float64
        overwritten with nothing of use
    norms_f64 : (n_rows, n_columns) float64
        one column is written
    """
    for row in range(delta_f32.size // n_cols):
        norms_f64[row, column] = _norm(delta_f32[row * n_cols : (row + 1) * n_cols], lanes_f64)


@njit(cache=True, nogil=True)
def _norm(x, lanes):
    whole = x.size // LANES * LANES
    for k in range(LANES):
        lanes[k] = 0.0
    for i in range(0, whole, LANES):
        # A slice, whose indices LLVM sees not to be negative, and a length that it does not know: else it
        # unrolls the loop before it tries to vectorise.
        part = x[i : i + LANES]
        for k in range(lanes.size):
            lanes[k] += np.float64(abs(part[k]))
    rest = x[whole:]
    for k in range(rest.size):
        lanes[k] += np.float64(abs(rest[k]))
    return fold_lanes(lanes)


@njit(cache=True, nogil=True)
def count_overflows(x_f32, limit, count_i64):
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
