"""Q4_K: super-blocks of 256 values, eight sub-blocks of 32, each with its own scale and minimum.

value = d * scale * q - dmin * minimum, with q of 4 bits, scale and minimum of 6 bits. Block of
144 bytes (ggml-common.h, block_q4_K): d and dmin as binary16; 12 bytes of scales and minima; 128
bytes, where byte 32 p + j holds quant j of sub-block 2 p below and of sub-block 2 p + 1 above.

The encoder is ggml's quantize_row_q4_K_ref, bit for bit, turned on its side: 64 sub-blocks stand
beside each other, tile[element, lane], and every loop runs over lanes. Each lane adds in the order
of ggml's scalar code, so the sums are the same, and the compiler can use SIMD without reordering a
sum: 14 times ggml's speed with AVX-512, 7 with AVX2. A last tile is computed whole; what stands in
its unused lanes is never written out.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import float_to_half, half_to_float, nearest_int

LANES = 64
TOP = 15  # largest quant
STEPS = 21  # candidate scales of the search
FIRST = -1.0  # what the first candidate adds to TOP; each further one adds 0.1

BEYOND = np.float32(1 << 22)

# Rows of LANES float32 in the scratch, after the 32 rows of the tile, of its weights and of its quants.
WEIGHT = 0 * LANES  # root mean square; |x| is added to it to weigh an error
SUM_W = 1 * LANES
SUM_X = 2 * LANES  # weighted, like the sums below
LARGEST = 3 * LANES
SMALLEST = 4 * LANES  # minimum of the best fit so far, never positive
SCALE = 5 * LANES  # scale of the best fit so far
ERROR = 6 * LANES  # its weighted squared error
FIT_INVERSE = 7 * LANES  # quants of the best fit: round(FIT_INVERSE * (x - FIT_MIN))
FIT_MIN = 8 * LANES
INVERSE = 9 * LANES  # 1 / scale of the candidate
SUM_L = 10 * LANES  # of its quants, l in ggml's code
SUM_L2 = 11 * LANES
SUM_XL = 12 * LANES
NEW_SCALE = 13 * LANES  # least squares for those quants
NEW_MIN = 14 * LANES
NEW_ERROR = 15 * LANES
LEAST = 16 * LANES  # value of the lane
SCRATCH_LEN = (32 + 32 + 32 + 17) * LANES


@njit(cache=True, nogil=True, error_model="numpy")
def _scale_and_minimum(packed, j):
    # get_scale_min_k4: the upper two bits of the last four stand above the first four
    if j < 4:
        scale = packed[j] & 63
        minimum = packed[j + 4] & 63
    else:
        scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
        minimum = packed[j + 4] >> 4 | packed[j] >> 6 << 4
    return np.float32(np.int32(scale)), np.float32(np.int32(minimum))


@njit(cache=True, nogil=True, error_model="numpy")
def decode_q4_k(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_q4_K).

    Parameters
    ----------
    raw_u8 : (n_blocks * 144,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 256,) float32
        written
    """
    for i in range(raw_u8.size // 144):
        block = raw_u8[144 * i : 144 * i + 144]
        d = half_to_float(block[0], block[1])
        dmin = half_to_float(block[2], block[3])
        for j in range(0, 8, 2):
            scale, minimum = _scale_and_minimum(block[4:16], j)
            low_step, low_offset = np.float32(d * scale), np.float32(dmin * minimum)
            scale, minimum = _scale_and_minimum(block[4:16], j + 1)
            high_step, high_offset = np.float32(d * scale), np.float32(dmin * minimum)
            quants = block[16 + 16 * j : 48 + 16 * j]
            y = out_f32[256 * i + 32 * j : 256 * i + 32 * j + 64]
            # Both at once: a shorter loop LLVM unrolls before it tries to vectorise
            for k in range(32):
                y[k] = low_step * np.float32(np.int32(quants[k] & 15)) - low_offset
                y[32 + k] = high_step * np.float32(np.int32(quants[k] >> 4)) - high_offset


@njit(cache=True, nogil=True, error_model="numpy")
def _level(v):
    return np.float32(min(max(nearest_int(v), np.int32(0)), np.int32(TOP)))


@njit(cache=True, nogil=True, error_model="numpy")
def _regular_level(v):
    # The same for 0 <= v < BEYOND, without leaving float.
    level = np.float32(np.float32(v + np.float32(12582912.0)) - np.float32(12582912.0))
    return level if level < np.float32(TOP) else np.float32(TOP)


@njit(cache=True, nogil=True, error_model="numpy")
def _measure(tile, weights, state):
    # Weights, their sums and the range of each lane.
    for lane in range(LANES):
        state[WEIGHT + lane] = np.float32(0.0)
        state[SUM_W + lane] = np.float32(0.0)
        state[SUM_X + lane] = np.float32(-0.0)  # changes nothing: ggml starts with the first term
        state[SMALLEST + lane] = tile[lane]
        state[LARGEST + lane] = tile[lane]
    # Eight elements a turn: sums stay in registers for so long, and LLVM unrolls the inner loop.
    for i in range(0, 32, 8):
        for lane in range(LANES):
            for k in range(8):
                x = tile[(i + k) * LANES + lane]
                state[WEIGHT + lane] += np.float32(x * x)
    for lane in range(LANES):
        state[WEIGHT + lane] = np.sqrt(np.float32(state[WEIGHT + lane] / np.float32(32.0)))
    for i in range(0, 32, 8):
        for lane in range(LANES):
            smallest = state[SMALLEST + lane]
            largest = state[LARGEST + lane]
            for k in range(8):
                x = tile[(i + k) * LANES + lane]
                w = np.float32(state[WEIGHT + lane] + abs(x))
                weights[(i + k) * LANES + lane] = w
                smallest = x if x < smallest else smallest
                largest = x if x > largest else largest
                state[SUM_W + lane] += w
                state[SUM_X + lane] += np.float32(w * x)
            state[SMALLEST + lane] = smallest
            state[LEAST + lane] = smallest
            state[LARGEST + lane] = largest


@njit(cache=True, nogil=True, error_model="numpy")
def _is_regular(state, lane):
    # Whether all v of the lane are numbers to `nearest_int`, and grow with x; of a flat lane no v matters.
    smallest, inverse = state[SMALLEST + lane], state[INVERSE + lane]
    first = np.float32(inverse * np.float32(state[LEAST + lane] - smallest))
    last = np.float32(inverse * np.float32(state[LARGEST + lane] - smallest))
    return ((inverse > 0) & (first > -BEYOND) & (last < BEYOND)) | (state[ERROR + lane] < 0)


@njit(cache=True, nogil=True, error_model="numpy")
def _project(tile, weights, quants, state, divisor):
    # Quants of a candidate, and their weighted sums.
    n_regular = np.int32(0)
    for lane in range(LANES):
        spread = np.float32(state[LARGEST + lane] - state[SMALLEST + lane])
        state[INVERSE + lane] = np.float32(divisor / spread)
        state[SUM_L + lane] = np.float32(0.0)
        state[SUM_L2 + lane] = np.float32(0.0)
        state[SUM_XL + lane] = np.float32(0.0)
        n_regular = np.int32(n_regular + np.int32(_is_regular(state, lane)))
    for i in range(0, 32, 8):
        for lane in range(LANES):
            sum_l = state[SUM_L + lane]
            sum_l2 = state[SUM_L2 + lane]
            sum_xl = state[SUM_XL + lane]
            for k in range(8):
                x = tile[(i + k) * LANES + lane]
                w = weights[(i + k) * LANES + lane]
                smallest = state[SMALLEST + lane]
                v = np.float32((x if x > smallest else smallest) - smallest)
                level = _regular_level(np.float32(state[INVERSE + lane] * v))
                quants[(i + k) * LANES + lane] = level
                wl = np.float32(w * level)
                sum_l = np.float32(sum_l + wl)
                sum_l2 = np.float32(sum_l2 + np.float32(wl * level))
                sum_xl = np.float32(sum_xl + np.float32(wl * x))
            state[SUM_L + lane] = sum_l
            state[SUM_L2 + lane] = sum_l2
            state[SUM_XL + lane] = sum_xl
    if n_regular < LANES:
        for lane in range(LANES):
            if not _is_regular(state, lane):
                _project_lane(tile, weights, quants, state, lane)


@njit(cache=True, nogil=True, error_model="numpy")
def _project_lane(tile, weights, quants, state, lane):
    # The same for a lane of extremes.
    sum_l = sum_l2 = sum_xl = np.float32(0.0)
    for at in range(lane, tile.size, LANES):
        x = tile[at]
        v = np.float32(x - state[SMALLEST + lane])
        level = _level(np.float32(state[INVERSE + lane] * v))
        quants[at] = level
        wl = np.float32(weights[at] * level)
        sum_l = np.float32(sum_l + wl)
        sum_l2 = np.float32(sum_l2 + np.float32(wl * level))
        sum_xl = np.float32(sum_xl + np.float32(wl * x))
    state[SUM_L + lane] = sum_l
    state[SUM_L2 + lane] = sum_l2
    state[SUM_XL + lane] = sum_xl


@njit(cache=True, nogil=True, error_model="numpy")
def _solve(state):
    # Weighted least squares for scale and minimum; the minimum must not be positive.
    for lane in range(LANES):
        sum_w = state[SUM_W + lane]
        sum_x = state[SUM_X + lane]
        sum_l = state[SUM_L + lane]
        sum_l2 = state[SUM_L2 + lane]
        sum_xl = state[SUM_XL + lane]
        det = np.float32(np.float32(sum_w * sum_l2) - np.float32(sum_l * sum_l))
        scale = np.float32(np.float32(sum_w * sum_xl) - np.float32(sum_x * sum_l))
        minimum = np.float32(np.float32(sum_l2 * sum_x) - np.float32(sum_l * sum_xl))
        minimum = np.float32(minimum / det)
        scale = sum_xl if minimum > 0 else scale
        scale = np.float32(scale / (sum_l2 if minimum > 0 else det))
        # Without a positive determinant there is no candidate: NaN compares as no better.
        state[NEW_SCALE + lane] = scale if det > 0 else np.float32(np.nan)
        state[NEW_MIN + lane] = np.float32(0.0) if minimum > 0 else minimum
        state[NEW_ERROR + lane] = np.float32(0.0)


@njit(cache=True, nogil=True, error_model="numpy")
def _judge(tile, weights, quants, state, is_first):
    # Error of a candidate; the better of it and the best so far stays.
    for i in range(0, 32, 8):
        for lane in range(LANES):
            error = state[NEW_ERROR + lane]
            for k in range(8):
                x = tile[(i + k) * LANES + lane]
                level = quants[(i + k) * LANES + lane]
                diff = np.float32(state[NEW_SCALE + lane] * level)
                diff = np.float32(np.float32(diff + state[NEW_MIN + lane]) - x)
                w = weights[(i + k) * LANES + lane]
                error = np.float32(error + np.float32(w * np.float32(diff * diff)))
            state[NEW_ERROR + lane] = error
    for lane in range(LANES):
        better = is_first or state[NEW_ERROR + lane] < state[ERROR + lane]
        smallest = state[SMALLEST + lane]
        inverse = state[INVERSE + lane]
        state[FIT_INVERSE + lane] = inverse if better else state[FIT_INVERSE + lane]
        state[FIT_MIN + lane] = smallest if better else state[FIT_MIN + lane]
        state[SMALLEST + lane] = state[NEW_MIN + lane] if better else smallest
        state[SCALE + lane] = state[NEW_SCALE + lane] if better else state[SCALE + lane]
        state[ERROR + lane] = state[NEW_ERROR + lane] if better else state[ERROR + lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _fit_range(tile, weights, quants, state):
    # First fit: the quants span the range of the lane, and zero.
    for lane in range(LANES):
        smallest = state[SMALLEST + lane]
        state[SMALLEST + lane] = np.float32(0.0) if smallest > 0 else smallest
        state[ERROR + lane] = np.float32(0.0)
    _project(tile, weights, quants, state, np.float32(TOP))
    for lane in range(LANES):
        state[NEW_SCALE + lane] = np.float32(np.float32(1.0) / state[INVERSE + lane])
        state[NEW_MIN + lane] = state[SMALLEST + lane]
        state[NEW_ERROR + lane] = np.float32(0.0)
    _judge(tile, weights, quants, state, True)
    for lane in range(LANES):
        flat = state[LARGEST + lane] == state[SMALLEST + lane]
        # A flat lane has scale 0 and quants 0 for good: no candidate has an error below -1.
        state[SCALE + lane] = np.float32(0.0) if flat else state[SCALE + lane]
        state[ERROR + lane] = np.float32(-1.0) if flat else state[ERROR + lane]
        state[FIT_INVERSE + lane] = np.float32(0.0) if flat else state[FIT_INVERSE + lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _write_header(state, first_lane, block):
    # d, dmin and the eight 6-bit scales and minima.
    max_scale = np.float32(0.0)
    max_min = np.float32(0.0)
    for lane in range(first_lane, first_lane + 8):
        scale = state[SCALE + lane]
        minimum = np.float32(-state[SMALLEST + lane])
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
        scale_q = nearest_int(np.float32(inv_scale * state[SCALE + lane]))
        min_q = nearest_int(np.float32(inv_min * np.float32(-state[SMALLEST + lane])))
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
def _write_quants(x, inverses, minima, levels, block):
    # Quants for the scales as they were rounded.
    d = half_to_float(block[0], block[1])
    dmin = half_to_float(block[2], block[3])
    for j in range(8):
        scale, minimum = _scale_and_minimum(block[4:16], j)
        step = np.float32(d * scale)
        offset = np.float32(dmin * minimum)
        sub = x[32 * j : 32 * j + 32]
        sub_levels = levels[32 * j : 32 * j + 32]
        if step != 0:
            for k in range(sub.size):
                sub_levels[k] = _level(np.float32(np.float32(sub[k] + offset) / step))
        else:  # ggml leaves the quants of the search in place
            inverse = inverses[j]
            smallest = minima[j]
            for k in range(sub.size):
                sub_levels[k] = _level(np.float32(inverse * np.float32(sub[k] - smallest)))
    for j in range(4):
        low = levels[64 * j : 64 * j + 32]
        high = levels[64 * j + 32 : 64 * j + 64]
        quants = block[16 + 32 * j : 48 + 32 * j]
        for k in range(quants.size):
            quants[k] = np.uint8(np.int32(low[k]) | np.int32(high[k]) << 4)


@njit(cache=True, nogil=True, error_model="numpy")
def write_quants_q4_k(x_f32, inverses_f32, minima_f32, levels_f32, out_u8):
    """Write the quants of blocks whose scales and minima are written already.

    Parameters
    ----------
    x_f32 : (n_blocks * 256,) float32
        finite values
    inverses_f32, minima_f32 : (n_blocks * 8,) float32
        of the sub-blocks whose scale is zero: quants are round(inverse * (x - minimum))
    levels_f32 : (>= 256,) float32
        overwritten
    out_u8 : (n_blocks * 144,) uint8
        the quants are written
    """
    for i in range(out_u8.size // 144):
        inverses = inverses_f32[8 * i : 8 * i + 8]
        minima = minima_f32[8 * i : 8 * i + 8]
        block = out_u8[144 * i : 144 * i + 144]
        _write_quants(x_f32[256 * i : 256 * i + 256], inverses, minima, levels_f32, block)


@njit(cache=True, nogil=True, error_model="numpy")
def encode_q4_k(x_f32, scratch_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_q4_K_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 256,) float32
        finite values
    scratch_f32 : (>= SCRATCH_LEN,) float32
        overwritten
    out_u8 : (n_blocks * 144,) uint8
        written
    """
    tile = scratch_f32[: 32 * LANES]
    weights = scratch_f32[32 * LANES : 64 * LANES]
    quants = scratch_f32[64 * LANES : 96 * LANES]
    state = scratch_f32[96 * LANES : SCRATCH_LEN]
    n_sub = x_f32.size // 32
    for first in range(0, n_sub, LANES):
        n_lanes = min(LANES, n_sub - first)
        for lane in range(n_lanes):
            x = x_f32[32 * (first + lane) : 32 * (first + lane) + 32]
            for k in range(32):
                tile[k * LANES + lane] = x[k]
        _measure(tile, weights, state)
        _fit_range(tile, weights, quants, state)
        for step in range(STEPS):
            tenths = np.float32(np.float32(0.1) * np.float32(step))
            divisor = np.float32(np.float32(np.float32(FIRST) + tenths) + np.float32(TOP))
            _project(tile, weights, quants, state, divisor)
            _solve(state)
            _judge(tile, weights, quants, state, False)
        for lane in range(0, n_lanes, 8):
            i = (first + lane) // 8
            x = x_f32[256 * i : 256 * i + 256]
            block = out_u8[144 * i : 144 * i + 144]
            _write_header(state, lane, block)
            inverses = state[FIT_INVERSE + lane : FIT_INVERSE + lane + 8]
            minima = state[FIT_MIN + lane : FIT_MIN + lane + 8]
            _write_quants(x, inverses, minima, quants, block)
