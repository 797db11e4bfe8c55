"""Arcee Fusion: how much a row's distribution changed, and which changes are large beside it."""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import LANES, exp, fold_lanes, log


@njit(cache=True, nogil=True, error_model="numpy")
def row_divergences(x_f32, base_f32, n_cols, lanes_f64, out_f64):
    """Kullback-Leibler divergence of each row's softmax from the base's.

    `sum_i p_i log(p_i / q_i)` with p = softmax(x) + 1e-8 and q = softmax(base) + 1e-8, not below zero
    (mergekit 0.1.5). Rows are summed as in `gram.row_grams`.

    Parameters
    ----------
    x_f32, base_f32 : (n_rows * n_cols,) float32
        the same rows of a model and of the base
    n_cols : int
        elements in one row
    lanes_f64 : (LANES,) float64
        overwritten with nothing of use
    out_f64 : (n_rows,) float64
        written
    """
    for row in range(out_f64.size):
        x = x_f32[row * n_cols : (row + 1) * n_cols]
        base = base_f32[row * n_cols : (row + 1) * n_cols]
        x_most = _largest(x)
        base_most = _largest(base)
        x_scale = 1.0 / _sum_exp(x, x_most, lanes_f64)
        base_scale = 1.0 / _sum_exp(base, base_most, lanes_f64)
        for k in range(LANES):
            lanes_f64[k] = 0.0
        for i in range(n_cols):
            p = exp(np.float64(x[i]) - x_most) * x_scale + 1e-8
            q = exp(np.float64(base[i]) - base_most) * base_scale + 1e-8
            lanes_f64[i % LANES] += p * log(p / q)
        divergence = fold_lanes(lanes_f64)
        out_f64[row] = divergence if divergence > 0.0 else 0.0


@njit(cache=True, nogil=True)
def _largest(x):
    most = x[0]
    for i in range(x.size):
        most = x[i] if x[i] > most else most
    return np.float64(most)


@njit(cache=True, nogil=True)
def _sum_exp(x, most, lanes):
    for k in range(LANES):
        lanes[k] = 0.0
    for i in range(x.size):
        lanes[i % LANES] += exp(np.float64(x[i]) - most)
    return fold_lanes(lanes)


@njit(cache=True, nogil=True)
def importances(x_f32, base_f32, n_cols, divergences_f64, out_f32):
    """Size of every change, times the divergence of its row.

    Parameters
    ----------
    x_f32, base_f32 : (n_rows * n_cols,) float32
        the same rows of a model and of the base
    n_cols : int
        elements in one row
    divergences_f64 : (n_rows,) float64
        of `row_divergences`
    out_f32 : (n_rows * n_cols,) float32
        written
    """
    for row in range(divergences_f64.size):
        x = x_f32[row * n_cols : (row + 1) * n_cols]
        base = base_f32[row * n_cols : (row + 1) * n_cols]
        out = out_f32[row * n_cols : (row + 1) * n_cols]
        divergence = divergences_f64[row]
        for i in range(n_cols):
            change = abs(np.float64(np.float32(x[i] - base[i])))
            out[i] = np.float32(change * divergence)


@njit(cache=True, nogil=True)
def take_important(threshold, importances_f32, x_f32, base_f32):
    """Take from a model what is at least as important as a threshold.

    Parameters
    ----------
    threshold : float
        compared in float64
    importances_f32 : (n,) float32
        of `importances`
    x_f32 : (n,) float32
        weights of the model
    base_f32 : (n,) float32
        weights of the base; overwritten by the result
    """
    for i in range(base_f32.size):
        change = np.float32(x_f32[i] - base_f32[i])
        kept = np.float64(importances_f32[i]) >= threshold
        base_f32[i] += change if kept else np.float32(0.0)
