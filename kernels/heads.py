"""Sketches of attention heads, streamed by rows, and distances between them.

A head's weights are compared through a random projection of the model dimension d to s numbers, whose
rows have one entry of +1 or -1 each (CountSketch: Charikar et al. 2002; Weinberger et al. 2009). Its
estimate of a squared distance has the same mean and variance as that of a dense matrix of signs,
2/s * sum of G_ij^2 over i != j for the Gram matrix G of the difference, and it costs one addition per
weight instead of s.
"""

import numpy as np
from numba import njit

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)


@njit(cache=True, nogil=True)
def draw_sketch(key, n_buckets, buckets_i32, signs_f64):
    """Draw the projection: for each model dimension the bucket it is added to, and with which sign.

    Entry i is taken from `splitmix64(key + i * gamma)` (Steele et al. 2014), so it depends on key and
    index alone: models of every width share their first entries.

    Parameters
    ----------
    key : uint64
        hash of the seed
    n_buckets : int
        s, dimensions of a sketch
    buckets_i32 : (d,) int32
        written: 0 to n_buckets - 1
    signs_f64 : (d,) float64
        written: +1 or -1
    """
    for i in range(buckets_i32.size):
        z = np.uint64(key) + np.uint64(i) * GAMMA
        z = (z ^ (z >> np.uint64(30))) * MIX_1
        z = (z ^ (z >> np.uint64(27))) * MIX_2
        z = z ^ (z >> np.uint64(31))
        buckets_i32[i] = np.int32((z >> np.uint64(32)) % np.uint64(n_buckets))
        signs_f64[i] = 1.0 if z & np.uint64(1) else -1.0


@njit(cache=True, nogil=True)
def sketch_rows(x_f32, buckets_i32, signs_f64, sums_f64, out_f32):
    """Sketch rows of q, k or v: out = W S, each row summed in float64 and rounded once.

    Parameters
    ----------
    x_f32 : (n_rows * d,) float32
        rows of a projection
    buckets_i32, signs_f64 : (d,) int32, (d,) float64
        from `draw_sketch`
    sums_f64 : (s,) float64
        overwritten with nothing of use
    out_f32 : (n_rows, s) float32
        written
    """
    d = buckets_i32.size
    for row in range(out_f32.shape[0]):
        for t in range(sums_f64.size):
            sums_f64[t] = 0.0
        first = row * d
        for j in range(d):
            sums_f64[buckets_i32[j]] += signs_f64[j] * np.float64(x_f32[first + j])
        for t in range(sums_f64.size):
            out_f32[row, t] = np.float32(sums_f64[t])


@njit(cache=True, nogil=True)
def sketch_columns(x_f32, first_row, buckets_i32, signs_f64, out_f64):
    """Add rows of o to its sketch: out = S^T W, of which heads own columns.

    Rows are added one by one in order, so that blocks do not show.

    Parameters
    ----------
    x_f32 : (n_rows * n_cols,) float32
        rows of o
    first_row : int
        index of the first of them in o
    buckets_i32, signs_f64 : (d,) int32, (d,) float64
        from `draw_sketch`
    out_f64 : (s, n_cols) float64
        running sums, added to
    """
    n_cols = out_f64.shape[1]
    for row in range(x_f32.size // n_cols):
        bucket = buckets_i32[first_row + row]
        sign = signs_f64[first_row + row]
        for j in range(n_cols):
            out_f64[bucket, j] += sign * np.float64(x_f32[row * n_cols + j])


@njit(cache=True, nogil=True)
def squared_norms(x_f32, out_f64):
    """Sum the squares of each head's features, in order.

    Parameters
    ----------
    x_f32 : (n, m) float32
        features, a row per head
    out_f64 : (n,) float64
        written
    """
    for i in range(x_f32.shape[0]):
        total = 0.0
        for t in range(x_f32.shape[1]):
            total += np.float64(x_f32[i, t]) * np.float64(x_f32[i, t])
        out_f64[i] = total


@njit(cache=True, nogil=True)
def squared_distances(a_f32, b_f32, out_f64):
    """Compute the squared distance of every head of one model to every head of another.

    Differences are squared, not norms subtracted: equal heads are at distance zero exactly. (Four
    running sums were tried, as one addition waits for the last: a quarter less time, not worth it.)

    Parameters
    ----------
    a_f32, b_f32 : (n, m), (k, m) float32
        features, a row per head
    out_f64 : (n, k) float64
        written
    """
    for i in range(a_f32.shape[0]):
        for j in range(b_f32.shape[0]):
            total = 0.0
            for t in range(a_f32.shape[1]):
                difference = np.float64(a_f32[i, t]) - np.float64(b_f32[j, t])
                total += difference * difference
            out_f64[i, j] = total


@njit(cache=True, nogil=True)
def add_products(a_f32, b_f32, out_f64):
    """Add A^T B of some rows: out[p, q] += A[i, p] * B[i, q], rows one by one in order.

    Parameters
    ----------
    a_f32, b_f32 : (n_rows, m), (n_rows, k) float32
        the same rows of two matrices
    out_f64 : (m, k) float64
        running sums, added to
    """
    for i in range(a_f32.shape[0]):
        for p in range(a_f32.shape[1]):
            factor = np.float64(a_f32[i, p])
            for q in range(b_f32.shape[1]):
                out_f64[p, q] += factor * np.float64(b_f32[i, q])
