"""Scales by weighted errors, without minima: Q3_K, Q6_K, Q4_0 and Q5_0 with an importance matrix.

ggml's make_qx_quants with weights (rmse_type 1), bit for bit, turned on its side as q6_k.py explains:
64 sub-blocks stand beside each other, tile[element, lane], and every loop runs over lanes.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import float_to_half, nearest_int

LANES = 64
STEPS = 19  # candidate scales of the search
EPSILON = np.float32(1e-15)  # ggml's GROUP_MAX_EPS: what is smaller counts as zero

# Rows of LANES float32 in a fit
SCALE = 0 * LANES  # of the best fit so far
EXTREME = 1 * LANES  # value of largest magnitude, with its sign
FIT_INVERSE = 2 * LANES  # quants of the best fit: round(FIT_INVERSE * x)
SUM_W = 3 * LANES
QUALITY = 4 * LANES  # scale times its sum of x l; a better fit has more
INVERSE = 5 * LANES  # 1 / scale of the candidate
SUM_XL = 6 * LANES  # of its quants, l in ggml's code; weighted
SUM_L2 = 7 * LANES


@njit(cache=True, nogil=True, error_model="numpy")
def _level(v, top):
    return np.float32(min(max(nearest_int(v), np.int32(-top)), np.int32(top - 1)))


@njit(cache=True, nogil=True, error_model="numpy")
def _find_extremes(tile, weights, fit):
    n = tile.size // LANES
    for lane in range(LANES):
        fit[EXTREME + lane] = np.float32(0.0)
        fit[SUM_W + lane] = np.float32(0.0)
    for k in range(n):
        for lane in range(LANES):
            x = tile[k * LANES + lane]
            extreme = fit[EXTREME + lane]
            fit[EXTREME + lane] = x if abs(x) > abs(extreme) else extreme
            fit[SUM_W + lane] += weights[k * LANES + lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _project(tile, weights, dividend, top, fit):
    # Quants of a candidate, and their weighted sums.
    n = tile.size // LANES
    for lane in range(LANES):
        fit[INVERSE + lane] = np.float32(dividend / fit[EXTREME + lane])
        fit[SUM_XL + lane] = np.float32(0.0)
        fit[SUM_L2 + lane] = np.float32(0.0)
    # Eight elements a turn: sums stay in registers for so long, and LLVM unrolls the inner loop. As
    # slices, whose indices LLVM sees not to be negative: else it does not vectorise.
    for i in range(0, n, 8):
        tile_8 = tile[i * LANES : (i + 8) * LANES]
        weights_8 = weights[i * LANES : (i + 8) * LANES]
        for lane in range(LANES):
            sum_xl = fit[SUM_XL + lane]
            sum_l2 = fit[SUM_L2 + lane]
            for k in range(8):
                x = tile_8[k * LANES + lane]
                w = weights_8[k * LANES + lane]
                level = _level(np.float32(fit[INVERSE + lane] * x), top)
                sum_xl = np.float32(sum_xl + np.float32(np.float32(w * x) * level))
                sum_l2 = np.float32(sum_l2 + np.float32(np.float32(w * level) * level))
            fit[SUM_XL + lane] = sum_xl
            fit[SUM_L2 + lane] = sum_l2


@njit(cache=True, nogil=True, error_model="numpy")
def _judge(first, fit):
    # The better of a candidate and the best so far stays.
    for lane in range(LANES):
        sum_xl = fit[SUM_XL + lane]
        sum_l2 = fit[SUM_L2 + lane]
        quality = fit[QUALITY + lane]
        better = sum_l2 > 0 and np.float32(sum_xl * sum_xl) > np.float32(quality * sum_l2)
        better = better or first
        scale = np.float32(sum_xl / sum_l2) if sum_l2 != 0 else np.float32(0.0)
        inverse = fit[INVERSE + lane]
        fit[QUALITY + lane] = np.float32(scale * sum_xl) if better else quality
        fit[SCALE + lane] = scale if better else fit[SCALE + lane]
        fit[FIT_INVERSE + lane] = inverse if better else fit[FIT_INVERSE + lane]


@njit(cache=True, nogil=True, error_model="numpy")
def search_symmetric(tile, weights, top, fit, quants):
    """Find the scales of sub-blocks that have the least weighted squared errors.

    Parameters
    ----------
    tile, weights : (n * LANES,) float32
        values and their weights, a sub-block to a lane; n is a multiple of 8
    top : int
        quants are from -top to top - 1
    fit : (8 * LANES,) float32
        written; rows 0 to 3 are scale, value of largest magnitude, 1 / scale that gave the quants,
        and sum of the weights
    quants : (n * LANES,) float32
        written
    """
    n = tile.size // LANES
    _find_extremes(tile, weights, fit)
    for step in range(STEPS):
        tenths = 0 if step == 0 else step - 10 if step < 10 else step - 9  # 0, -9 ... -1, 1 ... 9
        dividend = np.float32(np.float32(0.1) * np.float32(tenths))
        dividend = np.float32(-np.float32(np.float32(top) + dividend))
        _project(tile, weights, dividend, top, fit)
        _judge(step == 0, fit)
    for lane in range(LANES):
        zero = abs(fit[EXTREME + lane]) < EPSILON
        fit[SCALE + lane] = np.float32(0.0) if zero else fit[SCALE + lane]
    for k in range(n):
        for lane in range(LANES):
            zero = abs(fit[EXTREME + lane]) < EPSILON
            level = _level(np.float32(fit[FIT_INVERSE + lane] * tile[k * LANES + lane]), top)
            quants[k * LANES + lane] = np.float32(-top) if zero else level


@njit(cache=True, nogil=True, error_model="numpy")
def write_scales_q3_k(fit, scratch_f32, out_u8):
    """Write d and the scales of Q3_K blocks: make_qx_quants again, over a block's sixteen scales.

    Parameters
    ----------
    fit : (8 * LANES,) float32
        from `search_symmetric`; sixteen lanes to a block
    scratch_f32 : (>= 16,) float32
        overwritten
    out_u8 : (n_blocks * 110,) uint8
        bytes 96 to 109 of each block are written
    """
    levels = scratch_f32[:16]
    for i in range(out_u8.size // 110):
        block = out_u8[110 * i : 110 * i + 110]
        block[96:110] = 0
        scales = fit[SCALE + 16 * i : SCALE + 16 * i + 16]
        sums = fit[SUM_W + 16 * i : SUM_W + 16 * i + 16]
        half = float_to_half(_fit_scales(scales, sums, levels))
        block[108] = half & 255
        block[109] = half >> 8
        for j in range(16):
            code = np.int32(levels[j])
            block[96 + (j & 7)] |= np.uint8((code & 15) << np.int32(4 * (j >> 3)))
            block[104 + (j & 3)] |= np.uint8(code >> 4 << np.int32(2 * (j >> 2)))


@njit(cache=True, nogil=True, error_model="numpy")
def _fit_scales(x, w, levels):
    # make_qx_quants(16, 32, x, levels, 1, w) as it stands; levels are from 0 to 63
    extreme = np.float32(0.0)
    for j in range(16):
        extreme = x[j] if abs(x[j]) > abs(extreme) else extreme
    if abs(extreme) < EPSILON:
        for j in range(16):
            levels[j] = np.float32(0.0)
        return np.float32(0.0)
    best_inverse = np.float32(0.0)
    best = np.float32(0.0)
    scale = np.float32(0.0)
    for step in range(STEPS):
        tenths = 0 if step == 0 else step - 10 if step < 10 else step - 9
        dividend = np.float32(np.float32(0.1) * np.float32(tenths))
        inverse = np.float32(np.float32(-np.float32(np.float32(32.0) + dividend)) / extreme)
        sum_xl = np.float32(0.0)
        sum_l2 = np.float32(0.0)
        for j in range(16):
            level = _level(np.float32(inverse * x[j]), 32)
            sum_xl = np.float32(sum_xl + np.float32(np.float32(w[j] * x[j]) * level))
            sum_l2 = np.float32(sum_l2 + np.float32(np.float32(w[j] * level) * level))
        better = sum_l2 > 0 and np.float32(sum_xl * sum_xl) > np.float32(best * sum_l2)
        if step == 0 or better:
            scale = np.float32(sum_xl / sum_l2) if sum_l2 != 0 else np.float32(0.0)
            best = np.float32(scale * sum_xl)
            best_inverse = inverse
    for j in range(16):
        levels[j] = _level(np.float32(best_inverse * x[j]), 32) + np.float32(32.0)
    return scale


@njit(cache=True, nogil=True, error_model="numpy")
def write_q4_0_weighted(fit, quants, out_u8):
    """Write Q4_0 blocks (quantize_row_q4_0_impl).

    Parameters
    ----------
    fit : (8 * LANES,) float32
        from `search_symmetric` with top 8; a block to a lane
    quants : (32 * LANES,) float32
        from there too
    out_u8 : (n_blocks * 18,) uint8
        written
    """
    for i in range(out_u8.size // 18):
        block = out_u8[18 * i : 18 * i + 18]
        half = float_to_half(fit[SCALE + i])
        block[0] = half & 255
        block[1] = half >> 8
        for k in range(16):
            low = np.int32(quants[k * LANES + i]) + 8
            block[2 + k] = np.uint8(low | (np.int32(quants[(16 + k) * LANES + i]) + 8) << 4)


@njit(cache=True, nogil=True, error_model="numpy")
def write_q5_0_weighted(fit, quants, out_u8):
    """Write Q5_0 blocks (quantize_row_q5_0_impl).

    Parameters
    ----------
    fit : (8 * LANES,) float32
        from `search_symmetric` with top 16; a block to a lane
    quants : (32 * LANES,) float32
        from there too
    out_u8 : (n_blocks * 22,) uint8
        written
    """
    for i in range(out_u8.size // 22):
        block = out_u8[22 * i : 22 * i + 22]
        half = float_to_half(fit[SCALE + i])
        block[0] = half & 255
        block[1] = half >> 8
        block[2:6] = 0
        for k in range(16):
            low = np.int32(quants[k * LANES + i]) + 16
            high = np.int32(quants[(16 + k) * LANES + i]) + 16
            block[6 + k] = np.uint8(low & 15 | (high & 15) << 4)
            block[2 + (k >> 3)] |= np.uint8(low >> 4 << (k & 7))
            block[4 + (k >> 3)] |= np.uint8(high >> 4 << (k & 7))
