"""Scales and minima by weighted errors: Q2_K, Q4_K, Q5_K, Q4_1 and Q5_1 with an importance matrix.

ggml's make_qkx3_quants with weights, bit for bit, turned on its side as affine_search.py explains: 64
sub-blocks stand beside each other, tile[element, lane], and every loop runs over lanes.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import float_to_half, nearest_int

LANES = 64
STEPS = 37  # candidate scales of the search
FIRST = -0.9  # what the first candidate adds to the largest quant; each further one adds 0.05

# Rows of LANES float32 in a fit
SCALE = 0 * LANES  # of the best fit so far
SMALLEST = 1 * LANES  # its minimum, never positive
SUM_W = 2 * LANES
FIT_INVERSE = 3 * LANES  # quants of the best fit: round(FIT_INVERSE * (x - FIT_MIN))
FIT_MIN = 4 * LANES
SUM_X = 5 * LANES  # weighted, like the sums below
LARGEST = 6 * LANES
ERROR = 7 * LANES  # weighted squared error of the best fit
INVERSE = 8 * LANES  # 1 / scale of the candidate
SUM_L = 9 * LANES  # of its quants, l in ggml's code
SUM_L2 = 10 * LANES
SUM_XL = 11 * LANES
NEW_SCALE = 12 * LANES  # least squares for those quants
NEW_MIN = 13 * LANES
NEW_ERROR = 14 * LANES


@njit(cache=True, nogil=True, error_model="numpy")
def _level(v, top):
    return np.float32(min(max(nearest_int(v), np.int32(0)), np.int32(top)))


@njit(cache=True, nogil=True, error_model="numpy")
def _measure(tile, weights, fit):
    # Sums of the weights and the range of each lane.
    n = tile.size // LANES
    for lane in range(LANES):
        fit[SUM_W + lane] = np.float32(0.0)
        fit[SUM_X + lane] = np.float32(-0.0)  # changes nothing: ggml starts with the first term
        fit[SMALLEST + lane] = tile[lane]
        fit[LARGEST + lane] = tile[lane]
    # Eight elements a turn: sums stay in registers for so long, and LLVM unrolls the inner loop. As
    # slices, whose indices LLVM sees not to be negative: else it does not vectorise.
    for i in range(0, n, 8):
        tile_8 = tile[i * LANES : (i + 8) * LANES]
        weights_8 = weights[i * LANES : (i + 8) * LANES]
        for lane in range(LANES):
            smallest = fit[SMALLEST + lane]
            largest = fit[LARGEST + lane]
            for k in range(8):
                x = tile_8[k * LANES + lane]
                w = weights_8[k * LANES + lane]
                smallest = x if x < smallest else smallest
                largest = x if x > largest else largest
                fit[SUM_W + lane] += w
                fit[SUM_X + lane] += np.float32(w * x)
            fit[SMALLEST + lane] = smallest
            fit[LARGEST + lane] = largest


@njit(cache=True, nogil=True, error_model="numpy")
def _fit_range(tile, weights, top, fit):
    # First fit: the quants span the range of the lane, and zero.
    n = tile.size // LANES
    for lane in range(LANES):
        smallest = fit[SMALLEST + lane]
        smallest = np.float32(0.0) if smallest > 0 else smallest
        inverse = np.float32(np.float32(top) / np.float32(fit[LARGEST + lane] - smallest))
        fit[SMALLEST + lane] = smallest
        fit[INVERSE + lane] = inverse
        fit[SCALE + lane] = np.float32(np.float32(1.0) / inverse)
        fit[ERROR + lane] = np.float32(0.0)
    for i in range(0, n, 8):
        tile_8 = tile[i * LANES : (i + 8) * LANES]
        weights_8 = weights[i * LANES : (i + 8) * LANES]
        for lane in range(LANES):
            smallest = fit[SMALLEST + lane]
            error = fit[ERROR + lane]
            for k in range(8):
                x = tile_8[k * LANES + lane]
                level = _level(np.float32(fit[INVERSE + lane] * np.float32(x - smallest)), top)
                diff = np.float32(np.float32(fit[SCALE + lane] * level) + smallest - x)
                w = weights_8[k * LANES + lane]
                error = np.float32(error + np.float32(w * np.float32(diff * diff)))
            fit[ERROR + lane] = error
    for lane in range(LANES):
        smallest = fit[SMALLEST + lane]
        flat = fit[LARGEST + lane] <= smallest
        # A flat lane has scale 0 and quants 0 for good: no candidate has an error below -1.
        fit[SCALE + lane] = np.float32(0.0) if flat else fit[SCALE + lane]
        fit[ERROR + lane] = np.float32(-1.0) if flat else fit[ERROR + lane]
        fit[FIT_INVERSE + lane] = np.float32(0.0) if flat else fit[INVERSE + lane]
        fit[FIT_MIN + lane] = smallest


@njit(cache=True, nogil=True, error_model="numpy")
def _project(tile, weights, divisor, top, fit, quants):
    # Quants of a candidate, and their weighted sums.
    n = tile.size // LANES
    for lane in range(LANES):
        spread = np.float32(fit[LARGEST + lane] - fit[SMALLEST + lane])
        fit[INVERSE + lane] = np.float32(divisor / spread)
        fit[SUM_L + lane] = np.float32(0.0)
        fit[SUM_L2 + lane] = np.float32(0.0)
        fit[SUM_XL + lane] = np.float32(0.0)
    for i in range(0, n, 8):
        tile_8 = tile[i * LANES : (i + 8) * LANES]
        weights_8 = weights[i * LANES : (i + 8) * LANES]
        quants_8 = quants[i * LANES : (i + 8) * LANES]
        for lane in range(LANES):
            sum_l = fit[SUM_L + lane]
            sum_l2 = fit[SUM_L2 + lane]
            sum_xl = fit[SUM_XL + lane]
            for k in range(8):
                x = tile_8[k * LANES + lane]
                v = np.float32(x - fit[SMALLEST + lane])
                level = _level(np.float32(fit[INVERSE + lane] * v), top)
                quants_8[k * LANES + lane] = level
                wl = np.float32(weights_8[k * LANES + lane] * level)
                sum_l = np.float32(sum_l + wl)
                sum_l2 = np.float32(sum_l2 + np.float32(wl * level))
                sum_xl = np.float32(sum_xl + np.float32(wl * x))
            fit[SUM_L + lane] = sum_l
            fit[SUM_L2 + lane] = sum_l2
            fit[SUM_XL + lane] = sum_xl


@njit(cache=True, nogil=True, error_model="numpy")
def _solve(fit):
    # Weighted least squares for scale and minimum; the minimum must not be positive.
    for lane in range(LANES):
        sum_w = fit[SUM_W + lane]
        sum_x = fit[SUM_X + lane]
        sum_l = fit[SUM_L + lane]
        sum_l2 = fit[SUM_L2 + lane]
        sum_xl = fit[SUM_XL + lane]
        det = np.float32(np.float32(sum_w * sum_l2) - np.float32(sum_l * sum_l))
        scale = np.float32(np.float32(sum_w * sum_xl) - np.float32(sum_x * sum_l))
        scale = np.float32(scale / det)
        minimum = np.float32(np.float32(sum_l2 * sum_x) - np.float32(sum_l * sum_xl))
        minimum = np.float32(minimum / det)
        scale = np.float32(sum_xl / sum_l2) if minimum > 0 else scale
        # Without a positive determinant there is no candidate: NaN compares as no better.
        fit[NEW_SCALE + lane] = scale if det > 0 else np.float32(np.nan)
        fit[NEW_MIN + lane] = np.float32(0.0) if minimum > 0 else minimum
        fit[NEW_ERROR + lane] = np.float32(0.0)


@njit(cache=True, nogil=True, error_model="numpy")
def _judge(tile, weights, quants, fit):
    # Error of a candidate; the better of it and the best so far stays.
    n = tile.size // LANES
    for i in range(0, n, 8):
        tile_8 = tile[i * LANES : (i + 8) * LANES]
        weights_8 = weights[i * LANES : (i + 8) * LANES]
        quants_8 = quants[i * LANES : (i + 8) * LANES]
        for lane in range(LANES):
            error = fit[NEW_ERROR + lane]
            for k in range(8):
                diff = np.float32(fit[NEW_SCALE + lane] * quants_8[k * LANES + lane])
                diff = np.float32(np.float32(diff + fit[NEW_MIN + lane]) - tile_8[k * LANES + lane])
                w = weights_8[k * LANES + lane]
                error = np.float32(error + np.float32(w * np.float32(diff * diff)))
            fit[NEW_ERROR + lane] = error
    for lane in range(LANES):
        better = fit[NEW_ERROR + lane] < fit[ERROR + lane]
        smallest = fit[SMALLEST + lane]
        inverse = fit[INVERSE + lane]
        fit[FIT_INVERSE + lane] = inverse if better else fit[FIT_INVERSE + lane]
        fit[FIT_MIN + lane] = smallest if better else fit[FIT_MIN + lane]
        fit[SMALLEST + lane] = fit[NEW_MIN + lane] if better else smallest
        fit[SCALE + lane] = fit[NEW_SCALE + lane] if better else fit[SCALE + lane]
        fit[ERROR + lane] = fit[NEW_ERROR + lane] if better else fit[ERROR + lane]


@njit(cache=True, nogil=True, error_model="numpy")
def search_affine(tile, weights, top, fit, quants):
    """Find the scales and minima of sub-blocks that have the least weighted squared errors.

    Parameters
    ----------
    tile, weights : (n * LANES,) float32
        values and their weights, a sub-block to a lane; n is a multiple of 8
    top : int
        largest quant
    fit : (16 * LANES,) float32
        written; rows 0 to 4 are scale, minimum (never positive), sum of the weights, and a and b
        of the quants, which are round(a * (x - b))
    quants : (n * LANES,) float32
        written with those quants
    """
    n = tile.size // LANES
    _measure(tile, weights, fit)
    _fit_range(tile, weights, top, fit)
    for step in range(STEPS):
        addend = np.float32(np.float32(0.05) * np.float32(step))
        divisor = np.float32(np.float32(np.float32(FIRST) + addend) + np.float32(top))
        _project(tile, weights, divisor, top, fit, quants)
        _solve(fit)
        _judge(tile, weights, quants, fit)
    for k in range(n):
        for lane in range(LANES):
            v = np.float32(tile[k * LANES + lane] - fit[FIT_MIN + lane])
            quants[k * LANES + lane] = _level(np.float32(fit[FIT_INVERSE + lane] * v), top)


@njit(cache=True, nogil=True, error_model="numpy")
def write_q4_1_weighted(fit, quants, out_u8):
    """Write Q4_1 blocks (quantize_row_q4_1_impl).

    Parameters
    ----------
    fit : (16 * LANES,) float32
        from `search_affine` with top 15; a block to a lane
    quants : (32 * LANES,) float32
        from there too
    out_u8 : (n_blocks * 20,) uint8
        written
    """
    for i in range(out_u8.size // 20):
        block = out_u8[20 * i : 20 * i + 20]
        half = float_to_half(fit[SCALE + i])
        block[0] = half & 255
        block[1] = half >> 8
        half = float_to_half(fit[SMALLEST + i])
        block[2] = half & 255
        block[3] = half >> 8
        for k in range(16):
            block[4 + k] = np.uint8(
                np.int32(quants[k * LANES + i]) | np.int32(quants[(16 + k) * LANES + i]) << 4
            )


@njit(cache=True, nogil=True, error_model="numpy")
def write_q5_1_weighted(fit, quants, out_u8):
    """Write Q5_1 blocks (quantize_row_q5_1_impl).

    Parameters
    ----------
    fit : (16 * LANES,) float32
        from `search_affine` with top 31; a block to a lane
    quants : (32 * LANES,) float32
        from there too
    out_u8 : (n_blocks * 24,) uint8
        written
    """
    for i in range(out_u8.size // 24):
        block = out_u8[24 * i : 24 * i + 24]
        half = float_to_half(fit[SCALE + i])
        block[0] = half & 255
        block[1] = half >> 8
        half = float_to_half(fit[SMALLEST + i])
        block[2] = half & 255
        block[3] = half >> 8
        block[4:8] = 0
        for k in range(16):
            low = np.int32(quants[k * LANES + i])
            high = np.int32(quants[(16 + k) * LANES + i])
            block[8 + k] = np.uint8(low & 15 | (high & 15) << 4)
            block[4 + (k >> 3)] |= np.uint8(low >> 4 << (k & 7))
            block[6 + (k >> 3)] |= np.uint8(high >> 4 << (k & 7))
