"""Scales of scales: the heads of Q2_K, Q4_K and Q5_K blocks with an importance matrix.

ggml's make_qp_quants, bit for bit, in C's own order: a block has only eight or sixteen scales.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import float_to_half, nearest_int

LANES = 64  # of the fit, whose rows begin with scales, minima and sums of the weights
EPSILON = np.float32(1e-15)  # ggml's GROUP_MAX_EPS: what is smaller counts as zero


@njit(cache=True, nogil=True, error_model="numpy")
def _fit_positive(x, w, top, levels):
    # make_qp_quants: a scale for a block's scales or minima, and their quants, as bytes. Quants that
    # leave the range of a byte wrap around as in C, which decides what rows of extremes become.
    n = x.size
    largest = np.float32(0.0)
    for j in range(n):
        largest = largest if largest > x[j] else x[j]
        levels[j] = np.float32(0.0)
    if largest < EPSILON:
        return np.float32(0.0)
    inverse = np.float32(np.float32(top) / largest)
    scale = np.float32(np.float32(1.0) / inverse)
    best = np.float32(0.0)
    for j in range(n):
        level = np.float32(np.int32(nearest_int(np.float32(inverse * x[j])) & 255))
        diff = np.float32(x[j] - np.float32(scale * level))
        best = np.float32(best + np.float32(np.float32(w[j] * diff) * diff))
    for step in range(-4, 5):
        if step == 0:
            continue
        addend = np.float32(np.float32(0.1) * np.float32(step))
        candidate = np.float32(np.float32(addend + np.float32(top)) / largest)
        scale = np.float32(np.float32(1.0) / candidate)
        error = np.float32(0.0)
        for j in range(n):
            level = np.float32(min(nearest_int(np.float32(candidate * x[j])), np.int32(top)))
            diff = np.float32(x[j] - np.float32(scale * level))
            error = np.float32(error + np.float32(np.float32(w[j] * diff) * diff))
        inverse = candidate if error < best else inverse
        best = error if error < best else best
    sum_xl = np.float32(0.0)
    sum_l2 = np.float32(0.0)
    for j in range(n):
        quant = np.int32(min(nearest_int(np.float32(inverse * x[j])), np.int32(top)))
        levels[j] = np.float32(np.int32(quant & 255))
        level = np.float32(quant)
        sum_xl = np.float32(sum_xl + np.float32(np.float32(w[j] * x[j]) * level))
        sum_l2 = np.float32(sum_l2 + np.float32(np.float32(w[j] * level) * level))
    for _ in range(5):
        moved = False
        for j in range(n):
            level = levels[j]
            wx = np.float32(w[j] * x[j])
            other_xl = np.float32(sum_xl - np.float32(wx * level))
            other_l2 = np.float32(sum_l2 - np.float32(np.float32(w[j] * level) * level))
            if not (other_xl > 0 and other_l2 > 0):
                continue
            wanted = np.float32(np.float32(x[j] * other_l2) / other_xl)
            quant = np.int32(min(nearest_int(wanted), np.int32(top)))
            if quant == np.int32(levels[j]):
                continue
            wanted = np.float32(quant)
            other_xl = np.float32(other_xl + np.float32(wx * wanted))
            other_l2 = np.float32(other_l2 + np.float32(np.float32(w[j] * wanted) * wanted))
            gain = np.float32(np.float32(other_xl * other_xl) * sum_l2)
            if gain > np.float32(np.float32(sum_xl * sum_xl) * other_l2):
                levels[j] = np.float32(np.int32(quant & 255))
                sum_xl = other_xl
                sum_l2 = other_l2
                moved = True
        if not moved:
            break
    return np.float32(sum_xl / sum_l2) if sum_l2 > 0 else np.float32(0.0)


@njit(cache=True, nogil=True, error_model="numpy")
def write_scales_q4_k(fit, top, scratch_f32, out_u8):
    """Write d, dmin and the scales and minima of Q4_K or Q5_K blocks.

    Parameters
    ----------
    fit : (16 * LANES,) float32
        from `search_affine`; eight lanes to a block
    top : int
        largest byte of a scale or minimum that is kept: Q5_K clamps to 63, Q4_K trusts the search (255)
    scratch_f32 : (>= 80,) float32
        overwritten
    out_u8 : (n_blocks, block_bytes) uint8
        the first 16 bytes of each block are written
    """
    scales, minima, weights = scratch_f32[:16], scratch_f32[16:32], scratch_f32[32:48]
    scale_levels, min_levels = scratch_f32[48:64], scratch_f32[64:80]
    for i in range(out_u8.shape[0]):
        block = out_u8[i]
        for j in range(8):
            scales[j] = fit[8 * i + j]
            minima[j] = -fit[LANES + 8 * i + j]
            weights[j] = fit[2 * LANES + 8 * i + j]
        d = _fit_positive(scales[:8], weights[:8], 63, scale_levels[:8])
        dmin = _fit_positive(minima[:8], weights[:8], 63, min_levels[:8])
        for j in range(8):
            scale = np.int32(min(np.int32(scale_levels[j]), np.int32(top)))
            minimum = np.int32(min(np.int32(min_levels[j]), np.int32(top)))
            if j < 4:
                block[4 + j] = np.uint8(scale)
                block[8 + j] = np.uint8(minimum)
            else:
                block[8 + j] = np.uint8(scale & 15 | (minimum & 15) << 4)
                block[j] |= np.uint8(scale >> 4 << 6 & 255)
                block[4 + j] |= np.uint8(minimum >> 4 << 6 & 255)
        half = float_to_half(d)
        block[0] = half & 255
        block[1] = half >> 8
        half = float_to_half(dmin)
        block[2] = half & 255
        block[3] = half >> 8


@njit(cache=True, nogil=True, error_model="numpy")
def write_scales_q2_k(fit, scratch_f32, out_u8):
    """Write d, dmin and the scales and minima of Q2_K blocks.

    Parameters
    ----------
    fit : (16 * LANES,) float32
        from `search_affine`; sixteen lanes to a block
    scratch_f32 : (>= 80,) float32
        overwritten
    out_u8 : (n_blocks, 84) uint8
        bytes 0 to 15 and 80 to 83 of each block are written
    """
    scales, minima, weights = scratch_f32[:16], scratch_f32[16:32], scratch_f32[32:48]
    scale_levels, min_levels = scratch_f32[48:64], scratch_f32[64:80]
    for i in range(out_u8.shape[0]):
        block = out_u8[i]
        for j in range(16):
            scales[j] = fit[16 * i + j]
            minima[j] = -fit[LANES + 16 * i + j]
            weights[j] = fit[2 * LANES + 16 * i + j]
        d = _fit_positive(scales, weights, 15, scale_levels)
        dmin = _fit_positive(minima, weights, 15, min_levels)
        for j in range(16):
            block[j] = np.uint8((np.int32(scale_levels[j]) | np.int32(min_levels[j]) << 4) & 255)
        half = float_to_half(d)
        block[80] = half & 255
        block[81] = half >> 8
        half = float_to_half(dmin)
        block[82] = half & 255
        block[83] = half >> 8
