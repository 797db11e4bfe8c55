"""Grams of columns, block by block on the diagonal, and the least squares that merge by them.

Every number here is a sum whose terms are added one after the other, each product and each sum rounded. So
four at a time is as good as one, and no result depends on how rows are cut into blocks.
"""

import numpy as np
from numba import njit

TILE = 256  # columns at a time: sums of four rows and a few rows of factors stay in the first-level cache
ROWS = 32  # rows at a time, packed: in place they would lie in the same few sets of the cache
CHUNK = 64  # right-hand sides at a time


@njit(cache=True, nogil=True)
def add_grams(x_f32, width, sums_f32, packed_f32, grams_f32):
    """Add the products of the columns of some rows, `G += x' x`, for columns of one block only.

    Parameters
    ----------
    x_f32 : (n_rows, n_cols) float32
        rows of a task vector
    width : int
        columns in one block; the last block may have fewer
    sums_f32 : (4 * (TILE + ROWS),) float32
        overwritten with nothing of use
    packed_f32 : (ROWS, TILE) float32
        overwritten with nothing of use
    grams_f32 : (n_cols, width) float32
        running sums; row j has products of column j with those of its block, right only from j on
    """
    n_rows, n_cols = x_f32.shape
    factors = sums_f32[4 * TILE :]
    for first in range(0, n_rows, ROWS):
        rows = x_f32[first : min(first + ROWS, n_rows)]
        for block in range(0, n_cols, width):
            end = min(block + width, n_cols)
            for start in range(block, end, TILE):
                size = min(TILE, end - start)
                for k in range(rows.shape[0]):
                    _copy(rows[k, start : start + size], packed_f32[k, :size])
                for j in range(block, start + size, 4):
                    n_used = min(4, end - j)
                    for k in range(rows.shape[0]):
                        for r in range(4):
                            factors[4 * k + r] = rows[k, j + min(r, n_used - 1)]
                    skip = max(0, j - start) // 16 * 16  # whole vectors
                    at = start - block + skip
                    _load(grams_f32, j, n_used, at, size - skip, sums_f32)
                    _add_products(packed_f32, rows.shape[0], skip, size - skip, sums_f32)
                    _store(sums_f32, j, n_used, at, size - skip, grams_f32)


@njit(cache=True, nogil=True)
def combine(factors_f32, sums_f32, x_f32):
    """Sum task vectors by matrices that sum to one: `x[0] += sum_k (x[k] - x[0]) F[k]`.

    Parameters
    ----------
    factors_f32 : (n_models, n_cols, width) float32
        of `solve_factors`; the first is not used
    sums_f32 : (4 * (TILE + ROWS),) float32
        overwritten with nothing of use
    x_f32 : (n_models, n_rows, n_cols) float32
        task vectors; those of the first model are overwritten by the sum, others with nothing of use
    """
    n_models, n_cols, width = factors_f32.shape
    total = x_f32[0]
    for k in range(1, n_models):
        for row in range(total.shape[0]):
            _subtract(total[row], x_f32[k, row])
    for k in range(1, n_models):
        for block in range(0, n_cols, width):
            end = min(block + width, n_cols)
            for start in range(block, end, TILE):
                size = min(TILE, end - start)
                for j in range(block, end, ROWS):
                    matrix = factors_f32[k, j : min(j + ROWS, end)]
                    _combine_part(matrix, start - block, x_f32[k], j, start, size, sums_f32, total)


@njit(cache=True, nogil=True)
def _combine_part(matrix, at, delta, j, start, size, sums, total):
    """Add what columns from j on, as many as a matrix has rows, give to the columns from `start` on."""
    factors = sums[4 * TILE :]
    count, n_rows = matrix.shape[0], delta.shape[0]
    for row in range(0, n_rows, 4):
        n_used = min(4, n_rows - row)
        for r in range(4):
            source = delta[row + min(r, n_used - 1), j : j + count]
            for k in range(count):
                factors[4 * k + r] = source[k]
        _load(total, row, n_used, start, size, sums)
        _add_products(matrix, count, at, size, sums)
        _store(sums, row, n_used, start, size, total)


@njit(cache=True, nogil=True)
def _add_products(matrix, count, at, size, sums):
    """Add row k times its factor to sum r, `sums[4 * TILE + 4 * k + r]`, for k from 0 to count - 1."""
    a = sums[:size]
    b = sums[TILE : TILE + size]
    c = sums[2 * TILE : 2 * TILE + size]
    d = sums[3 * TILE : 3 * TILE + size]
    factors = sums[4 * TILE :]
    whole = count // 4 * 4
    for k in range(0, whole, 4):
        f = factors[4 * k : 4 * k + 16]
        p = matrix[k, at : at + size]
        q = matrix[k + 1, at : at + size]
        r = matrix[k + 2, at : at + size]
        s = matrix[k + 3, at : at + size]
        a0, a1, a2, a3 = f[0], f[4], f[8], f[12]
        b0, b1, b2, b3 = f[1], f[5], f[9], f[13]
        c0, c1, c2, c3 = f[2], f[6], f[10], f[14]
        d0, d1, d2, d3 = f[3], f[7], f[11], f[15]
        for i in range(size):
            a[i] = a[i] + a0 * p[i] + a1 * q[i] + a2 * r[i] + a3 * s[i]
            b[i] = b[i] + b0 * p[i] + b1 * q[i] + b2 * r[i] + b3 * s[i]
            c[i] = c[i] + c0 * p[i] + c1 * q[i] + c2 * r[i] + c3 * s[i]
            d[i] = d[i] + d0 * p[i] + d1 * q[i] + d2 * r[i] + d3 * s[i]
    for k in range(whole, count):
        p = matrix[k, at : at + size]
        a0, b0, c0, d0 = factors[4 * k], factors[4 * k + 1], factors[4 * k + 2], factors[4 * k + 3]
        for i in range(size):
            a[i] += a0 * p[i]
            b[i] += b0 * p[i]
            c[i] += c0 * p[i]
            d[i] += d0 * p[i]


@njit(cache=True, nogil=True)
def _load(matrix, row, n_used, column, size, sums):
    for r in range(n_used):
        _copy(matrix[row + r, column : column + size], sums[r * TILE : r * TILE + size])


@njit(cache=True, nogil=True)
def _store(sums, row, n_used, column, size, matrix):
    for r in range(n_used):
        _copy(sums[r * TILE : r * TILE + size], matrix[row + r, column : column + size])


@njit(cache=True, nogil=True)
def _copy(source, target):
    for i in range(target.size):
        target[i] = source[i]


@njit(cache=True, nogil=True)
def _subtract(source, target):
    for i in range(target.size):
        target[i] -= source[i]


@njit(cache=True, nogil=True)
def solve_factors(scales_f64, ridges_f64, width, upper_f64, sides_f64, grams_f32):
    """Turn Grams into the factors of least squares, `C[k] (C[0] + C[1] + ...)^-1`, `C = scale G + ridge I`.

    By Cholesky's decomposition, in float64.

    Parameters
    ----------
    scales_f64, ridges_f64 : (n_models,) float64
        of each model's Gram; the ridges are not all zero
    width : int
        columns in one block
    upper_f64 : (width, width) float64
        overwritten with nothing of use
    sides_f64 : (width, CHUNK) float64
        overwritten with nothing of use
    grams_f32 : (n_models, n_cols, width) float32
        of `add_grams`; overwritten by the factors, but for the first model's
    """
    n_models, n_cols, _ = grams_f32.shape
    for block in range(0, n_cols, width):
        size = min(width, n_cols - block)
        _add_up(scales_f64, ridges_f64, grams_f32, block, size, upper_f64)
        for k in range(1, n_models):
            gram = grams_f32[k, block : block + size]
            for j in range(size):  # the lower triangle from the upper one
                for i in range(j):
                    gram[j, i] = gram[i, j]
            for first in range(0, size, CHUNK):
                chunk = gram[first : min(first + CHUNK, size)]
                for j in range(size):
                    for c in range(CHUNK):
                        sides_f64[j, c] = 0.0
                for c in range(chunk.shape[0]):
                    for j in range(size):
                        sides_f64[j, c] = scales_f64[k] * np.float64(chunk[c, j])
                    sides_f64[first + c, c] += ridges_f64[k]
                _substitute(upper_f64, size, sides_f64)
                for c in range(chunk.shape[0]):
                    for j in range(size):
                        chunk[c, j] = np.float32(sides_f64[j, c])


@njit(cache=True, nogil=True)
def _add_up(scales, ridges, grams, block, size, upper):
    """Write Cholesky's U of the sum of all models' C over the upper triangle."""
    least = 0.0
    for k in range(ridges.size):
        least += ridges[k]
    for j in range(size):
        row = upper[j, :size]
        for i in range(size):
            row[i] = 0.0
        row[j] = least
        for k in range(ridges.size):
            gram = grams[k, block + j]
            for i in range(j, size):
                row[i] += scales[k] * np.float64(gram[i])
    for j in range(size):
        row = upper[j, j:size]
        whole = j // 4 * 4
        for t in range(0, whole, 4):
            f = (upper[t, j], upper[t + 1, j], upper[t + 2, j], upper[t + 3, j])
            _take_four(row, f, upper[t : t + 4, j:size])
        for t in range(whole, j):
            _take_one(row, upper[t, j], upper[t, j:size])
        pivot = np.sqrt(max(row[0], least))  # none is below the least eigenvalue, but by rounding
        row[0] = pivot
        for i in range(1, row.size):
            row[i] /= pivot


@njit(cache=True, nogil=True)
def _substitute(upper, size, sides):
    """Solve `U' U X = B` in place, for CHUNK columns of B."""
    for j in range(size):
        row = sides[j]
        whole = j // 4 * 4
        for t in range(0, whole, 4):
            f = (upper[t, j], upper[t + 1, j], upper[t + 2, j], upper[t + 3, j])
            _take_four(row, f, sides[t : t + 4])
        for t in range(whole, j):
            _take_one(row, upper[t, j], sides[t])
        for c in range(CHUNK):
            row[c] /= upper[j, j]
    for j in range(size - 1, -1, -1):
        row = sides[j]
        whole = j + 1 + (size - j - 1) // 4 * 4
        for t in range(j + 1, whole, 4):
            f = (upper[j, t], upper[j, t + 1], upper[j, t + 2], upper[j, t + 3])
            _take_four(row, f, sides[t : t + 4])
        for t in range(whole, size):
            _take_one(row, upper[j, t], sides[t])
        for c in range(CHUNK):
            row[c] /= upper[j, j]


@njit(cache=True, nogil=True)
def _take_four(row, factors, others):
    """Subtract four rows, each times its factor, one after the other."""
    a, b, c, d = factors
    p, q, r, s = others[0], others[1], others[2], others[3]
    for i in range(row.size):
        row[i] = row[i] - a * p[i] - b * q[i] - c * r[i] - d * s[i]


@njit(cache=True, nogil=True)
def _take_one(row, factor, other):
    for i in range(row.size):
        row[i] -= factor * other[i]
