"""NearSwap: towards another model where it is near (alchemonaut 2024, as in mergekit 0.1.5)."""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True, error_model="numpy")
def swap_near(threshold, x_f32, base_f32):
    """Move the base to a model, all the way where they differ by no more than a threshold.

    With `w = clip(threshold / max(|x - base|, 1e-6), 0, 1)`, the result is `w x + (1 - w) base`.

    Parameters
    ----------
    threshold : float
        the recipe's t; rounded to float32
    x_f32 : (n,) float32
        weights of the model
    base_f32 : (n,) float32
        weights of the base; overwritten by the result
    """
    near = np.float32(threshold)
    least = np.float32(1e-6)
    zero = np.float32(0.0)
    one = np.float32(1.0)
    for i in range(base_f32.size):
        distance = np.float32(abs(base_f32[i] - x_f32[i]))
        weight = np.float32(near / (least if distance < least else distance))
        weight = one if weight > one else weight
        weight = zero if weight < zero else weight
        base_f32[i] = np.float32(weight * x_f32[i]) + np.float32((one - weight) * base_f32[i])
