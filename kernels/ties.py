"""TIES: sign election and the mean of those that agree (Yadav et al. 2023, section 3)."""

import numpy as np
from numba import njit

TILE = 2048


@njit(cache=True, nogil=True)
def elect(weights_f32, normalize, scratch_f32, delta_f32):
    """Merge task vectors by elected sign; the sign of the weighted sum wins, zero counts as plus.

    `delta[0] = sum_k agree_k * w_k * delta_k`, divided by `sum_k agree_k * w_k` with `normalize`
    (by 1 where that is below 1e-8). A zero entry agrees with no sign. Same rules as mergekit 0.1.5.

    Parameters
    ----------
    weights_f32 : (n_models,) float32
        one factor per task vector
    normalize : bool
        divide by the weights of those that agree
    scratch_f32 : (3, TILE) float32
        overwritten with nothing of use
    delta_f32 : (n_models, n) float32
        trimmed task vectors; overwritten, row 0 by the result
    """
    n_models, n = delta_f32.shape
    zero = np.float32(0.0)
    one = np.float32(1.0)
    tiny = np.float32(1e-8)
    for start in range(0, n, TILE):
        size = min(TILE, n - start)
        vote = scratch_f32[0, :size]
        total = scratch_f32[1, :size]
        divisor = scratch_f32[2, :size]
        for i in range(size):
            vote[i] = zero
            total[i] = zero
            divisor[i] = zero
        for k in range(n_models):
            delta = delta_f32[k, start : start + size]
            weight = weights_f32[k]
            for i in range(size):
                weighted = weight * delta[i]
                delta[i] = weighted
                vote[i] += weighted
        for k in range(n_models):
            delta = delta_f32[k, start : start + size]
            weight = weights_f32[k]
            for i in range(size):
                agrees = (delta[i] > zero) if vote[i] >= zero else (delta[i] < zero)
                total[i] += delta[i] if agrees else zero
                divisor[i] += weight if agrees else zero
        merged = delta_f32[0, start : start + size]
        for i in range(size):
            by = divisor[i] if normalize and abs(divisor[i]) >= tiny else one
            merged[i] = total[i] / by
