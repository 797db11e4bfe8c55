"""What blocks of Q4_K and Q5_K have in common: their head, and quants for the scales and minima in it."""

import numpy as np
from numba import njit

from edgemerge.kernels.affine_search import SCALE, SMALLEST, level_of
from edgemerge.kernels.scalars import (
    float_to_half,
    half_to_float,
    nearest_int,
    scale_and_minimum,
)


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
def find_levels(x, inverses, minima, top, levels, block):
    """Find the quants of a block for its scales and minima as they were rounded.

    Parameters
    ----------
    x : (256,) float32
        values
    inverses, minima : (8,) float32
        of the sub-blocks whose scale is zero: quants are round(inverse * (x - minimum))
    top : float32
        largest quant
    levels : (>= 256,) float32
        written: the quants; may be the tile of a search that is over
    block : (>= 16,) uint8
        its head, as `write_head` wrote it
    """
    d = half_to_float(block[0], block[1])
    dmin = half_to_float(block[2], block[3])
    for j in range(8):
        scale, minimum = scale_and_minimum(block[4:16], j)
        step = np.float32(d * scale)
        offset = np.float32(dmin * minimum)
        sub = x[32 * j : 32 * j + 32]
        sub_levels = levels[32 * j : 32 * j + 32]
        if step != 0:
            for k in range(sub.size):
                sub_levels[k] = level_of(np.float32(np.float32(sub[k] + offset) / step), top)
        else:  # ggml leaves the quants of the search in place
            inverse = inverses[j]
            smallest = minima[j]
            for k in range(sub.size):
                sub_levels[k] = level_of(np.float32(inverse * np.float32(sub[k] - smallest)), top)
