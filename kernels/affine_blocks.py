"""What blocks of Q4_K and Q5_K have in common: their head, and a quant for the scale and minimum in it."""

import numpy as np
from numba import njit

from edgemerge.kernels.affine_search import SCALE, SMALLEST
from edgemerge.kernels.scalars import float_to_half, nearest_int, times_byte


@njit(cache=True, nogil=True, error_model="numpy")
def write_head(fit, first_lane, block):
    """Write d, dmin and the eight 6-bit scales and minima of a block.

    Parameters
    ----------
    fit : (FIT_LEN,) float32
        what `search_tile` left from FIT on
    first_lane : int
        of the block's first sub-block
    block : (>= 16,) uint8
        its first bytes are written
    """
    max_scale = np.float32(0.0)
    max_min = np.float32(0.0)
    for lane in range(first_lane, first_lane + 8):
        scale = fit[SCALE + lane]
        minimum = np.float32(-fit[SMALLEST + lane])
        max_scale = scale if scale > max_scale else max_scale
        max_min = minimum if minimum > max_min else max_min
    inv_scale = np.float32(np.float32(63.0) / max_scale) if max_scale > 0 else np.float32(0.0)
    inv_min = np.float32(np.float32(63.0) / max_min) if max_min > 0 else np.float32(0.0)
    half = float_to_half(np.float32(max_scale / np.float32(63.0)))
    block[0] = half & 255
    block[1] = half >> 8
    half = float_to_half(np.float32(max_min / np.float32(63.0)))
    block[2] = half & 255
    block[3] = half >> 8
    packed = block[4:16]
    for j in range(8):
        lane = first_lane + j
        scale_q = nearest_int(np.float32(inv_scale * fit[SCALE + lane]))
        min_q = nearest_int(np.float32(inv_min * np.float32(-fit[SMALLEST + lane])))
        scale_q = np.int32(min(scale_q & 255, 63))  # & 255: C's cast to uint8
        min_q = np.int32(min(min_q & 255, 63))
        if j < 4:
            packed[j] = scale_q
            packed[j + 4] = min_q
        else:
            packed[j + 4] = scale_q & 15 | (min_q & 15) << 4
            packed[j - 4] |= scale_q >> 4 << 6
            packed[j] |= min_q >> 4 << 6


@njit(cache=True, nogil=True, error_model="numpy")
def fit_of(head, inverses, minima, j):
    """Return what gives the quants of a sub-block.

    Parameters
    ----------
    head : tuple
        of the block, as `all_scales_and_minima` returns it
    inverses, minima : (8,) float32
        of the sub-blocks whose scale is zero: quants are round(inverse * (x - minimum))
    j : int
        number of the sub-block in the block

    Returns
    -------
    step, offset, inverse, minimum : float32
        d times the scale, dmin times the minimum
    """
    d, dmin, scales, offsets = head
    return times_byte(d, scales, j), times_byte(dmin, offsets, j), inverses[j], minima[j]


@njit(cache=True, nogil=True, error_model="numpy")
def quant_of(x, fit, top):
    """Return the quant of a value, an int32, for scale and minimum of its sub-block as they were rounded.

    Parameters
    ----------
    x : float32
        the value
    fit : tuple
        of its sub-block, from `fit_of`
    top : float32
        largest quant
    """
    step, offset, inverse, minimum = fit
    if step != 0:
        v = np.float32(np.float32(x + offset) / step)
    else:  # ggml leaves the quants of the search in place
        v = np.float32(inverse * np.float32(x - minimum))
    return min(max(nearest_int(v), np.int32(0)), np.int32(top))
