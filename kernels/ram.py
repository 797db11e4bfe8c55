"""RAM: mean over the models that changed an element (arXiv 2601.13572, as in mergekit 0.1.5)."""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def count_changes(least, delta_f32, counts_u32):
    """Count the elements that each model changed together with others, and alone.

    Parameters
    ----------
    least : float
        a change is larger than this; rounded to float32
    delta_f32 : (n_models, n) float32
        task vectors
    counts_u32 : (2 * n_models,) uint32
        running counts, added to: shared ones of all models, then those that only one changed
    """
    n_models, n = delta_f32.shape
    bound = np.float32(least)
    for i in range(n):
        count = 0
        last = 0
        for k in range(n_models):
            if abs(delta_f32[k, i]) > bound:
                count += 1
                last = k
        if count == 1:
            counts_u32[n_models + last] += np.uint32(1)
        elif count > 1:
            for k in range(n_models):
                if abs(delta_f32[k, i]) > bound:
                    counts_u32[k] += np.uint32(1)


@njit(cache=True, nogil=True, error_model="numpy")
def add_changes(least, alone_f32, delta_f32, base_f32):
    """Move the base along the mean of its changes, element by element.

    Where one model changed an element, its change is scaled and added. Where several did, the mean of
    theirs is.

    Parameters
    ----------
    least : float
        a change is larger than this; rounded to float32
    alone_f32 : (n_models,) float32
        per model: factor of what only it changed
    delta_f32 : (n_models, n) float32
        task vectors
    base_f32 : (n,) float32
        weights of the base; overwritten by the result
    """
    n_models, n = delta_f32.shape
    bound = np.float32(least)
    for i in range(n):
        count = 0
        last = 0
        for k in range(n_models):
            if abs(delta_f32[k, i]) > bound:
                count += 1
                last = k
        if count == 1:
            base_f32[i] += np.float32(alone_f32[last] * delta_f32[last, i])
        elif count > 1:
            total = np.float32(0.0)
            for k in range(n_models):
                if abs(delta_f32[k, i]) > bound:
                    total = np.float32(total + np.float32(delta_f32[k, i] / np.float32(count)))
            base_f32[i] += total
