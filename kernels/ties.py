"""TIES: sign election and the mean of those that agree (Yadav et al. 2023, section 3)."""

import numpy as np
from numba import njit

TILE = 1024  # elements: the arrays of a tile stay in the first-level cache


@njit(cache=True, nogil=True)
def elect(weights_f32, scales_f32, normalize, scale, scratch_f32, delta_f32, base_f32):
    """Move the base along what agrees of task vectors; the sign of their weighted sum wins, zero is plus.

    With `d_k = scales[k] * delta[k]`, `base += scale * sum_k agree_k * w_k * d_k`, the sum divided by
    `sum_k agree_k * w_k` with `normalize` (by 1 where that is below 1e-8). A zero entry agrees with no
    sign. Same rules as mergekit 0.1.5.

    Parameters
    ----------
    weights_f32, scales_f32 : (n_models,) float32
        per task vector: its weight, and what its kept elements are rescaled by
    normalize : bool
        divide by the weights of those that agree
    scale : float
        lambda of the recipe; rounded to float32
    scratch_f32 : (3, TILE) float32
        overwritten with nothing of use
    delta_f32 : (n_models, n) float32
        trimmed task vectors, overwritten
    base_f32 : (n,) float32
        weights of the base; overwritten by the result
    """
    n_models, n = delta_f32.shape
    factor = np.float32(scale)
    if n_models == 2:
        _elect_of_two(weights_f32, scales_f32, normalize, factor, delta_f32, base_f32)
        return
    for start in range(0, n, TILE):
        size = min(TILE, n - start)
        base = base_f32[start : start + size]
        vote = scratch_f32[0, :size]
        total = scratch_f32[1, :size]
        divisor = scratch_f32[2, :size]
        for k in range(n_models):
            _vote(weights_f32[k], scales_f32[k], k == 0, delta_f32[k, start : start + size], vote)
        for i in range(size):
            vote[i] = _sign(vote[i])
        for k in range(n_models):
            delta = delta_f32[k, start : start + size]
            if normalize:
                _add_weighted(weights_f32[k], k == 0, vote, delta, total, divisor)
            else:
                _add_agreeing(k == 0, vote, delta, total)
        if normalize:
            for i in range(size):
                by = divisor[i] if abs(divisor[i]) >= np.float32(1e-8) else np.float32(1.0)
                base[i] += factor * np.float32(total[i] / by)
        else:
            for i in range(size):
                base[i] += factor * total[i]


@njit(cache=True, nogil=True)
def _elect_of_two(weights, scales, normalize, factor, delta, base):
    # The same in one pass, with nothing put aside: twice as fast.
    first, second = delta[0], delta[1]
    w_0, w_1, s_0, s_1 = weights[0], weights[1], scales[0], scales[1]
    zero = np.float32(0.0)
    for i in range(base.size):
        d_0 = np.float32(w_0 * np.float32(s_0 * first[i]))
        d_1 = np.float32(w_1 * np.float32(s_1 * second[i]))
        sign = _sign(np.float32(d_0 + d_1))
        has_0, has_1 = _agrees(d_0, sign), _agrees(d_1, sign)
        total = np.float32((d_0 if has_0 else zero) + (d_1 if has_1 else zero))
        if normalize:
            divisor = np.float32((w_0 if has_0 else zero) + (w_1 if has_1 else zero))
            total = np.float32(
                total / (divisor if abs(divisor) >= np.float32(1e-8) else np.float32(1.0))
            )
        base[i] += np.float32(factor * total)


@njit(cache=True, nogil=True)
def _vote(weight, scale, is_first, delta, vote):
    if is_first:
        for i in range(vote.size):
            delta[i] = weight * np.float32(scale * delta[i])
            vote[i] = delta[i]
    else:
        for i in range(vote.size):
            delta[i] = weight * np.float32(scale * delta[i])
            vote[i] += delta[i]


@njit(cache=True, nogil=True)
def _sign(vote):
    return np.float32(1.0) if vote >= np.float32(0.0) else np.float32(-1.0)


@njit(cache=True, nogil=True)
def _agrees(delta, sign):
    # One product and one comparison: two comparisons and a choice take NEON six times as many instructions.
    return np.float32(sign * delta) > np.float32(0.0)


@njit(cache=True, nogil=True)
def _add_weighted(weight, is_first, signs, delta, total, divisor):
    zero = np.float32(0.0)
    if is_first:
        for i in range(signs.size):
            agrees = _agrees(delta[i], signs[i])
            total[i] = delta[i] if agrees else zero
            divisor[i] = weight if agrees else zero
    else:
        for i in range(signs.size):
            agrees = _agrees(delta[i], signs[i])
            total[i] += delta[i] if agrees else zero
            divisor[i] += weight if agrees else zero


@njit(cache=True, nogil=True)
def _add_agreeing(is_first, signs, delta, total):
    if is_first:
        for i in range(signs.size):
            total[i] = delta[i] if _agrees(delta[i], signs[i]) else np.float32(0.0)
    else:
        for i in range(signs.size):
            total[i] += delta[i] if _agrees(delta[i], signs[i]) else np.float32(0.0)
