"""LoRA: the change of rows of a weight (Hu et al. 2021), and rows that DoRA rescales (Liu et al. 2024)."""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import dot

TILE = 1024  # elements: the sums of four rows stay in the first-level cache


@njit(cache=True, nogil=True)
def add_product(left_f32, right_f32, scale, sums_f32, out_f32):
    """Add rows of the change: `out += scale * (left @ right)`, as peft's `get_delta_weight` rounds it.

    Each element sums its products in float32, from the first of the rank to the last. So no result depends
    on how a tensor is cut into blocks of rows.

    Parameters
    ----------
    left_f32 : (n_rows, rank) float32
        rows of B
    right_f32 : (rank, n_cols) float32
        A
    scale : float
        alpha / rank; rounded to float32
    sums_f32 : (4 * TILE,) float32
        overwritten with nothing of use
    out_f32 : (n_rows, n_cols) float32
        rows of the weight; the change is added
    """
    n_rows, n_cols = out_f32.shape
    factor = np.float32(scale)
    for start in range(0, n_cols, TILE):
        stop = min(start + TILE, n_cols)
        for row in range(0, n_rows, 4):
            # Four rows at a time use each element of A once. Rows after the last are the last again.
            a = sums_f32[: stop - start]
            b = sums_f32[TILE : TILE + stop - start]
            c = sums_f32[2 * TILE : 2 * TILE + stop - start]
            d = sums_f32[3 * TILE : 3 * TILE + stop - start]
            last = n_rows - 1
            _sum_rows(
                left_f32[row],
                left_f32[min(row + 1, last)],
                left_f32[min(row + 2, last)],
                left_f32[min(row + 3, last)],
                right_f32,
                start,
                a,
                b,
                c,
                d,
            )
            for k in range(min(4, n_rows - row)):
                x = out_f32[row + k, start:stop]
                total = sums_f32[k * TILE : k * TILE + stop - start]
                for i in range(x.size):
                    x[i] += factor * total[i]


@njit(cache=True, nogil=True)
def _sum_rows(p, q, r, s, right, start, a, b, c, d):
    """Write four rows of a product."""
    rank, stop = right.shape[0], start + a.size
    for i in range(a.size):
        a[i] = np.float32(0.0)
        b[i] = np.float32(0.0)
        c[i] = np.float32(0.0)
        d[i] = np.float32(0.0)
    whole = rank // 2 * 2
    for k in range(0, whole, 2):
        x, y = right[k, start:stop], right[k + 1, start:stop]
        p0, p1, q0, q1 = p[k], p[k + 1], q[k], q[k + 1]
        r0, r1, s0, s1 = r[k], r[k + 1], s[k], s[k + 1]
        for i in range(a.size):
            a[i] = a[i] + p0 * x[i] + p1 * y[i]
            b[i] = b[i] + q0 * x[i] + q1 * y[i]
            c[i] = c[i] + r0 * x[i] + r1 * y[i]
            d[i] = d[i] + s0 * x[i] + s1 * y[i]
    for k in range(whole, rank):
        x = right[k, start:stop]
        for i in range(a.size):
            a[i] += p[k] * x[i]
            b[i] += q[k] * x[i]
            c[i] += r[k] * x[i]
            d[i] += s[k] * x[i]


@njit(cache=True, nogil=True)
def rescale_rows(magnitude_f32, lanes_f64, x_f32):
    """Give each row the norm that DoRA trained: `x *= magnitude / norm(x)`, a row of zeros stays.

    Parameters
    ----------
    magnitude_f32 : (n_rows,) float32
        norms that the rows get
    lanes_f64 : (LANES,) float64
        overwritten with nothing of use
    x_f32 : (n_rows, n_cols) float32
        rows of the changed weight; rescaled
    """
    for row in range(x_f32.shape[0]):
        x = x_f32[row]
        norm = np.float32(np.sqrt(dot(x, x, lanes_f64)))
        if norm > np.float32(0.0):
            factor = magnitude_f32[row] / norm
            for i in range(x.size):
                x[i] *= factor
