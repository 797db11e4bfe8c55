"""Weighted sums over models, in place; the arithmetic under linear merging and task arithmetic."""

import numpy as np
from numba import njit

TILE = 2048  # elements: sums of one tile stay in the first-level cache while the models pass by


@njit(cache=True, nogil=True)
def subtract(base_f32, x_f32, n_overflows_i64):
    """Turn a model into its task vector: `x -= base` (Ilharco et al. 2023).

    Parameters
    ----------
    base_f32 : (n,) float32
        weights of the common base
    x_f32 : (n,) float32
        weights of an expert; overwritten by the difference
    n_overflows_i64 : (1,) int64
        written: differences that are infinite or no number, which cost nothing to count here
    """
    n = x_f32.size
    count = 0
    for start in range(0, n, TILE):
        stop = min(start + TILE, n)
        count += _subtract(base_f32[start:stop], x_f32[start:stop])
    n_overflows_i64[0] = count


@njit(cache=True, nogil=True)
def _subtract(base, x):
    # Counts in 32 bits, as wide as the numbers: a tile has fewer. What is stored is not loaded again, which
    # would be an order that LLVM has to keep.
    count = np.int32(0)
    for i in range(x.size):
        difference = np.float32(x[i] - base[i])
        bits = np.float32(difference).view(np.uint32) & np.uint32(0x7F800000)
        count = np.int32(count + np.int32(bits == np.uint32(0x7F800000)))
        x[i] = difference
    return count


@njit(cache=True, nogil=True)
def weighted_sum(weights_f32, x_f32):
    """Sum models by weight, in the order of the models: `x[0] = sum_k weights[k] * x[k]`.

    Parameters
    ----------
    weights_f32 : (n_models,) float32
        one factor per model
    x_f32 : (n_models, n) float32
        weights or task vectors; row 0 is overwritten by the sum
    """
    n_models, n = x_f32.shape
    for start in range(0, n, TILE):
        stop = min(start + TILE, n)
        total = x_f32[0, start:stop]
        weight = weights_f32[0]
        for i in range(total.size):
            total[i] *= weight
        for k in range(1, n_models):
            model = x_f32[k, start:stop]
            weight = weights_f32[k]
            for i in range(total.size):
                total[i] += weight * model[i]


@njit(cache=True, nogil=True)
def add_changes(weights_f32, scale, x_f32, limit, n_overflows_i64, base_f32):
    """Move the base along the sum of task vectors: `base += scale * sum_k weights[k] * (x[k] - base)`.

    `subtract`, `weighted_sum` and `add_scaled` in one pass over the first-level cache: the same roundings,
    and two thirds of the time, with the count.

    Parameters
    ----------
    weights_f32 : (n_models,) float32
        one factor per model
    scale : float
        lambda of the recipe; rounded to float32
    x_f32 : (n_models, n) float32
        weights of the experts; row 0 is overwritten
    limit : int
        bits of a non-negative float32
    n_overflows_i64 : (1,) int64
        written: results of at least this magnitude, or no numbers, as `norms.count_overflows` counts them
    base_f32 : (n,) float32
        weights of the base; overwritten by the result
    """
    n_models, n = x_f32.shape
    factor, least = np.float32(scale), np.uint32(limit)
    count = 0
    for start in range(0, n, TILE):
        stop = min(start + TILE, n)
        base = base_f32[start:stop]
        total = x_f32[0, start:stop]
        weight = weights_f32[0]
        for i in range(total.size):
            total[i] = weight * (total[i] - base[i])
        for k in range(1, n_models - 1):
            model = x_f32[k, start:stop]
            weight = weights_f32[k]
            for i in range(total.size):
                total[i] += weight * (model[i] - base[i])
        if n_models == 1:
            for i in range(total.size):
                base[i] += factor * total[i]
        else:
            _add_last(
                weights_f32[n_models - 1], factor, total, x_f32[n_models - 1, start:stop], base
            )
        count += _count_overflows(base.view(np.uint32), least)
    n_overflows_i64[0] = count


@njit(cache=True, nogil=True)
def _add_last(weight, factor, total, model, base):
    for i in range(base.size):
        sum_of_all = total[i] + weight * (model[i] - base[i])
        base[i] += factor * sum_of_all


@njit(cache=True, nogil=True)
def _count_overflows(bits, least):
    # In 32 bits, as wide as the numbers: a tile has fewer.
    count = np.int32(0)
    for i in range(bits.size):
        count = np.int32(count + np.int32((bits[i] & np.uint32(0x7FFFFFFF)) >= least))
    return count


@njit(cache=True, nogil=True)
def add_deltas(weights_f32, scales_f32, scale, delta_f32, base_f32):
    """Move the base along a sum of task vectors: `base += scale * sum_k weights[k] * (scales[k] * delta[k])`.

    Parameters
    ----------
    weights_f32, scales_f32 : (n_models,) float32
        per task vector: its weight, and the factor that rescales what is kept of it
    scale : float
        lambda of the recipe; rounded to float32
    delta_f32 : (n_models, n) float32
        task vectors; row 0 is overwritten
    base_f32 : (n,) float32
        weights of the base; overwritten by the result
    """
    n_models, n = delta_f32.shape
    factor = np.float32(scale)
    for start in range(0, n, TILE):
        stop = min(start + TILE, n)
        total = delta_f32[0, start:stop]
        weight = weights_f32[0]
        own = scales_f32[0]
        for i in range(total.size):
            total[i] = weight * np.float32(own * total[i])
        for k in range(1, n_models):
            delta = delta_f32[k, start:stop]
            weight = weights_f32[k]
            own = scales_f32[k]
            for i in range(total.size):
                total[i] += weight * np.float32(own * delta[i])
        base = base_f32[start:stop]
        for i in range(total.size):
            base[i] += factor * total[i]


@njit(cache=True, nogil=True)
def add_scaled(delta_f32, scale, base_f32):
    """Move the base along a task vector: `base += scale * delta` (Ilharco et al. 2023).

    Parameters
    ----------
    delta_f32 : (n,) float32
        merged task vector
    scale : float
        lambda of the recipe; rounded to float32
    base_f32 : (n,) float32
        weights of the base; overwritten by the result
    """
    factor = np.float32(scale)
    for i in range(base_f32.size):
        base_f32[i] += factor * delta_f32[i]
