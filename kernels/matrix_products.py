"""Matrix products whose sums have one order: what singular directions are found with.

No sum depends on vectors, threads or the height of blocks: an element adds its products one by one.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import dot

TILE = 512  # columns: the sums of four rows stay in the first-level cache
DEPTH = 64  # rows of the right matrix, which stay in the second-level cache with a tile
WIDTH = TILE + 16  # of a row of working memory: rows must not all lie in the same places of a cache
LOST = 1e-12  # of a squared norm: what is left of a direction that the others span is rounding


@njit(cache=True, nogil=True)
def add_product(left_f32, right_f32, sums_f32, out_f32):
    """Add a matrix product: `out += left @ right`.

    An element adds its products to what it was, in float32, from the first inner index to the last. So a
    product over the rows of a tensor is the same however these are cut into blocks.

    Parameters
    ----------
    left_f32 : (m, k) float32
        a matrix
    right_f32 : (k, n) float32
        a matrix
    sums_f32 : (4, WIDTH) float32
        overwritten with nothing of use
    out_f32 : (m, n) float32
        added to
    """
    n_rows, n_cols = out_f32.shape
    inner = right_f32.shape[0]
    for start in range(0, n_cols, TILE):
        stop = min(start + TILE, n_cols)
        for k in range(0, inner, DEPTH):
            part = right_f32[k : k + DEPTH]
            for row in range(0, n_rows, 4):
                _add_four(left_f32, k, part, start, stop, sums_f32, row, out_f32, start)


@njit(cache=True, nogil=True)
def project(rows_f32, directions_f32, scratch_f32, out_f32):
    """Write the dot products of directions with rows: `out = directions @ rows.T`, added as in `add_product`.

    Parameters
    ----------
    rows_f32 : (m, n) float32
        rows of a tensor
    directions_f32 : (q, n) float32
        vectors as long as a row
    scratch_f32 : (4 + DEPTH, WIDTH) float32
        overwritten with nothing of use
    out_f32 : (q, m) float32
        written
    """
    n_rows, n_cols = rows_f32.shape
    sums = scratch_f32[:4]
    for q in range(out_f32.shape[0]):
        out_f32[q, :] = np.float32(0.0)
    for start in range(0, n_rows, TILE):
        stop = min(start + TILE, n_rows)
        width = stop - start
        for k in range(0, n_cols, DEPTH):
            depth = min(DEPTH, n_cols - k)
            part = scratch_f32[4 : 4 + depth]
            _transpose(rows_f32[start:stop], k, part)
            for q in range(0, out_f32.shape[0], 4):
                _add_four(directions_f32, k, part, 0, width, sums, q, out_f32, start)


@njit(cache=True, nogil=True)
def _transpose(rows, first, out):
    # Four rows at a time: a store of four neighbours, where single ones would become slow scatters.
    depth, width = out.shape[0], rows.shape[0]
    whole = width // 4 * 4
    for i in range(0, whole, 4):
        a, b = rows[i, first : first + depth], rows[i + 1, first : first + depth]
        c, d = rows[i + 2, first : first + depth], rows[i + 3, first : first + depth]
        for j in range(depth):
            part = out[j, i : i + 4]
            part[0] = a[j]
            part[1] = b[j]
            part[2] = c[j]
            part[3] = d[j]
    for i in range(whole, width):
        row = rows[i, first : first + depth]
        for j in range(depth):
            out[j, i] = row[j]


@njit(cache=True, nogil=True)
def _add_four(left, k_left, right, start, stop, sums, row, out, out_start):
    # Four rows at a time use each element of the right matrix once. Rows after the last are the last again.
    # Arrays are whole rows of the matrices, as only of these Numba knows that neighbours are neighbours.
    last, width, depth = out.shape[0] - 1, stop - start, right.shape[0]
    row_b, row_c, row_d = min(row + 1, last), min(row + 2, last), min(row + 3, last)
    out_stop = out_start + width
    a, b, c, d = sums[0, :width], sums[1, :width], sums[2, :width], sums[3, :width]
    _copy(out[row, out_start:out_stop], a)
    _copy(out[row_b, out_start:out_stop], b)
    _copy(out[row_c, out_start:out_stop], c)
    _copy(out[row_d, out_start:out_stop], d)
    p, q = left[row, k_left : k_left + depth], left[row_b, k_left : k_left + depth]
    r, s = left[row_c, k_left : k_left + depth], left[row_d, k_left : k_left + depth]
    whole = depth // 4 * 4
    for k in range(0, whole, 4):
        x, y = right[k, start:stop], right[k + 1, start:stop]
        z, w = right[k + 2, start:stop], right[k + 3, start:stop]
        p0, p1, p2, p3 = p[k], p[k + 1], p[k + 2], p[k + 3]
        q0, q1, q2, q3 = q[k], q[k + 1], q[k + 2], q[k + 3]
        r0, r1, r2, r3 = r[k], r[k + 1], r[k + 2], r[k + 3]
        s0, s1, s2, s3 = s[k], s[k + 1], s[k + 2], s[k + 3]
        for i in range(width):
            a[i] = a[i] + p0 * x[i] + p1 * y[i] + p2 * z[i] + p3 * w[i]
            b[i] = b[i] + q0 * x[i] + q1 * y[i] + q2 * z[i] + q3 * w[i]
            c[i] = c[i] + r0 * x[i] + r1 * y[i] + r2 * z[i] + r3 * w[i]
            d[i] = d[i] + s0 * x[i] + s1 * y[i] + s2 * z[i] + s3 * w[i]
    for k in range(whole, depth):
        x = right[k, start:stop]
        for i in range(width):
            a[i] += p[k] * x[i]
            b[i] += q[k] * x[i]
            c[i] += r[k] * x[i]
            d[i] += s[k] * x[i]
    _copy(a, out[row, out_start:out_stop])
    _copy(b, out[row_b, out_start:out_stop])
    _copy(c, out[row_c, out_start:out_stop])
    _copy(d, out[row_d, out_start:out_stop])


@njit(cache=True, nogil=True)
def _copy(x, out):
    for i in range(out.size):
        out[i] = x[i]


@njit(cache=True, nogil=True)
def add_gram(rows_f32, sums_f64):
    """Add the products of all pairs of columns: `sums += rows.T @ rows`, row after row.

    Parameters
    ----------
    rows_f32 : (m, q) float32
        rows of a matrix
    sums_f64 : (q, q) float64
        added to
    """
    for row in range(rows_f32.shape[0]):
        x = rows_f32[row]
        for a in range(x.size):
            total = sums_f64[a]
            factor = np.float64(x[a])
            for b in range(x.size):
                total[b] += factor * np.float64(x[b])


@njit(cache=True, nogil=True, error_model="numpy")
def orthonormalise(vectors_f32, lanes_f64):
    """Make vectors orthonormal, one after the other, each by those before it (Gram-Schmidt, twice).

    A vector that those before it span becomes zero.

    Parameters
    ----------
    vectors_f32 : (q, n) float32
        overwritten
    lanes_f64 : (LANES,) float64
        overwritten with nothing of use
    """
    for k in range(vectors_f32.shape[0]):
        own = vectors_f32[k]
        before = dot(own, own, lanes_f64)
        for _ in range(2):
            for j in range(k):
                other = vectors_f32[j]
                factor = np.float32(dot(own, other, lanes_f64))
                for i in range(own.size):
                    own[i] -= factor * other[i]
        after = dot(own, own, lanes_f64)
        scale = np.float32(1.0 / np.sqrt(after) if after > LOST * before else 0.0)
        for i in range(own.size):
            own[i] *= scale
