"""Small matrices in float64: products, and the eigenvectors of symmetric ones.

LAPACK's last digits depend on the processor. These are additions, multiplications, divisions and square
roots in one order, which IEEE 754 rounds alike everywhere.
"""

import numpy as np
from numba import njit

MOST_SWEEPS = 60
NEGLIGIBLE = 2.0**-104  # squared cosine of two columns below which they are orthogonal


@njit(cache=True, nogil=True)
def multiply(left_f64, right_f64, out_f64):
    """Write a matrix product: `out = left @ right`, each element summed from the first inner index on.

    Parameters
    ----------
    left_f64 : (m, k) float64
        a matrix
    right_f64 : (k, n) float64
        a matrix
    out_f64 : (m, n) float64
        written
    """
    for i in range(out_f64.shape[0]):
        total = out_f64[i]
        for j in range(total.size):
            total[j] = 0.0
        for k in range(right_f64.shape[0]):
            factor = left_f64[i, k]
            row = right_f64[k]
            for j in range(total.size):
                total[j] += factor * row[j]


@njit(cache=True, nogil=True, error_model="numpy")
def decompose(matrix_f64, vectors_f64):
    """Find the eigenvectors of a symmetric matrix without negative eigenvalues (Jacobi, by rows).

    Parameters
    ----------
    matrix_f64 : (n, n) float64
        overwritten; the eigenvalues end on its diagonal, in no order
    vectors_f64 : (n, n) float64
        written: row i is the eigenvector of eigenvalue i
    """
    n = matrix_f64.shape[0]
    for i in range(n):
        for j in range(n):
            vectors_f64[i, j] = 1.0 if i == j else 0.0
    for _ in range(MOST_SWEEPS):
        is_done = True
        for p in range(n - 1):
            for q in range(p + 1, n):
                both = matrix_f64[p, q]
                if both * both <= NEGLIGIBLE * abs(matrix_f64[p, p] * matrix_f64[q, q]):
                    continue
                is_done = False
                _rotate(matrix_f64, vectors_f64, p, q)
        if is_done:
            return


@njit(cache=True, nogil=True, error_model="numpy")
def _rotate(matrix, vectors, p, q):
    # Golub and Van Loan 2013, 8.5: the smaller of the two angles that make element (p, q) zero.
    n = matrix.shape[0]
    first, second, both = matrix[p, p], matrix[q, q], matrix[p, q]
    ratio = (second - first) / (2.0 * both)
    tangent = 1.0 / (abs(ratio) + np.sqrt(ratio * ratio + 1.0))
    if ratio < 0.0:
        tangent = -tangent
    cosine = 1.0 / np.sqrt(tangent * tangent + 1.0)
    sine = tangent * cosine
    _turn(matrix[p], matrix[q], cosine, sine)
    for k in range(n):
        matrix[k, p] = matrix[p, k]
        matrix[k, q] = matrix[q, k]
    matrix[p, p] = first - tangent * both
    matrix[q, q] = second + tangent * both
    matrix[p, q] = 0.0
    matrix[q, p] = 0.0
    _turn(vectors[p], vectors[q], cosine, sine)


@njit(cache=True, nogil=True)
def _turn(x, y, cosine, sine):
    for i in range(x.size):
        a = x[i]
        b = y[i]
        x[i] = cosine * a - sine * b
        y[i] = sine * a + cosine * b
