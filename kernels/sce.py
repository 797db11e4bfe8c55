"""SCE: variances of task vectors, and the mean of those that agree (Wan et al. 2024, section 3.2)."""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True, error_model="numpy")
def variances(delta_f32, out_f32):
    """Variance of each element over the models, around their mean, divided by their number.

    Parameters
    ----------
    delta_f32 : (n_models, n) float32
        task vectors
    out_f32 : (n,) float32
        written
    """
    n_models, n = delta_f32.shape
    for i in range(n):
        total = np.float64(0.0)
        for k in range(n_models):
            total += np.float64(delta_f32[k, i])
        mean = total / n_models
        squares = np.float64(0.0)
        for k in range(n_models):
            away = np.float64(delta_f32[k, i]) - mean
            squares += away * away
        out_f32[i] = np.float32(squares / n_models)


@njit(cache=True, nogil=True)
def keep_marked(marks_f32, delta_f32):
    """Zero the elements of all models whose mark is zero.

    Parameters
    ----------
    marks_f32 : (n,) float32
        variances, those that are not selected zero
    delta_f32 : (n_models, n) float32
        task vectors, overwritten
    """
    n_models, n = delta_f32.shape
    for k in range(n_models):
        for i in range(n):
            delta_f32[k, i] = delta_f32[k, i] if marks_f32[i] != 0 else np.float32(0.0)


@njit(cache=True, nogil=True, error_model="numpy")
def add_agreeing(weights_f32, delta_f32, base_f32):
    """Move the base along the weighted mean of the task vectors with the sign of their plain sum.

    A sum of zero is positive, a zero entry agrees with no sign, and the sum of the weights that agree
    counts as 1e-6 at least (mergekit 0.1.5).

    Parameters
    ----------
    weights_f32 : (n_models,) float32
        one per model
    delta_f32 : (n_models, n) float32
        task vectors
    base_f32 : (n,) float32
        weights of the base; overwritten by the result
    """
    n_models, n = delta_f32.shape
    zero = np.float32(0.0)
    least = np.float32(1e-6)
    for i in range(n):
        vote = zero
        for k in range(n_models):
            vote = np.float32(vote + delta_f32[k, i])
        total = zero
        divisor = zero
        for k in range(n_models):
            delta = delta_f32[k, i]
            agrees = (delta > zero) if vote >= zero else (delta < zero)
            total = np.float32(total + (np.float32(weights_f32[k] * delta) if agrees else zero))
            divisor = np.float32(divisor + (weights_f32[k] if agrees else zero))
        base_f32[i] += np.float32(total / (divisor if divisor >= least else least))
