"""The search for scales and minima of Q4_K and Q5_K, in part of Q2_K, and the head of their blocks.

Super-blocks of 256 values, eight sub-blocks of 32, each with its own scale and minimum. The search is that
of ggml's quantize_row_q4_K_ref and quantize_row_q5_K_ref (make_qkx2_quants), bit for bit, turned on its
side: 64 sub-blocks stand beside each other, tile[element, lane], and every loop runs over lanes. Each lane
adds in the order of ggml's scalar code, so the sums are the same, and the compiler can use SIMD without
reordering a sum: 12 times ggml's speed with AVX-512, 9 with AVX2. A last tile is computed whole; what stands
in its unused lanes is never written out.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.llvm import is_arm64
from edgemerge.kernels.scalars import (
    float_to_half,
    half_to_float,
    nearest_int,
    scale_and_minimum,
)

LANES = 64
LIMIT = np.float32(1 << 22)

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
STATE = (32 + 32 + 32) * LANES
SCRATCH_LEN = STATE + 17 * LANES


@njit(cache=True, nogil=True, error_model="numpy")
def search_tile(x, first, n_lanes, top, n_steps, first_step, scratch):
    """Find scale and minimum of sub-blocks beside each other.

    Parameters
    ----------
    x : (n,) float32
        finite values, whole sub-blocks of 32
    first, n_lanes : int
        the sub-blocks: from this one on, up to LANES of them
    top : float32
        largest quant
    n_steps, first_step : int, float32
        candidates: the range is divided by top + first_step, and by 0.1 more each step
    scratch : (>= SCRATCH_LEN,) float32
        overwritten; from STATE on it holds rows of one number a lane: SCALE, SMALLEST, FIT_INVERSE, FIT_MIN
    """
    tile = scratch[: 32 * LANES]
    weights = scratch[32 * LANES : 64 * LANES]
    quants = scratch[64 * LANES : 96 * LANES]
    state = scratch[STATE:SCRATCH_LEN]
    for lane in range(n_lanes):
        sub = x[32 * (first + lane) : 32 * (first + lane) + 32]
        for k in range(32):
            tile[k * LANES + lane] = sub[k]
    _measure(tile, weights, state)
    _fit_range(tile, weights, quants, state, top)
    for step in range(n_steps):
        tenths = np.float32(np.float32(0.1) * np.float32(step))
        divisor = np.float32(np.float32(first_step + tenths) + top)
        _project(tile, weights, quants, state, divisor, top)
        solve(state)
        _judge(tile, weights, quants, state, False)


@njit(cache=True, nogil=True, error_model="numpy")
def _level(v, top):
    return np.float32(min(max(nearest_int(v), np.int32(0)), np.int32(top)))


@njit(cache=True, nogil=True, error_model="numpy")
def _regular_level(v, top):
    # The same for v < LIMIT, without leaving the registers of vectors. The bits of positive floats grow with
    # them, and LLVM makes one instruction of a minimum of integers on NEON, but not of floats.
    positive = np.int32(max(np.int32(np.float32(v).view(np.int32)), np.int32(0)))
    level = np.float32(np.rint(positive.view(np.float32)))
    top_bits = np.int32(np.float32(top).view(np.int32))
    return np.int32(min(np.int32(level.view(np.int32)), top_bits)).view(np.float32)


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
            smallest = state[SMALLEST + lane]
            largest = state[LARGEST + lane]
            squares = state[WEIGHT + lane]
            for k in range(8):
                x = tile[(i + k) * LANES + lane]
                smallest = x if x < smallest else smallest
                largest = x if x > largest else largest
                squares = np.float32(squares + np.float32(x * x))
            state[SMALLEST + lane] = smallest
            state[LEAST + lane] = smallest
            state[LARGEST + lane] = largest
            state[WEIGHT + lane] = squares
    for lane in range(LANES):
        state[WEIGHT + lane] = np.sqrt(np.float32(state[WEIGHT + lane] / np.float32(32.0)))
    for i in range(0, 32, 8):
        for lane in range(LANES):
            weight = state[WEIGHT + lane]
            sum_w = state[SUM_W + lane]
            sum_x = state[SUM_X + lane]
            for k in range(8):
                x = tile[(i + k) * LANES + lane]
                w = np.float32(weight + abs(x))
                weights[(i + k) * LANES + lane] = w
                sum_w = np.float32(sum_w + w)
                sum_x = np.float32(sum_x + np.float32(w * x))
            state[SUM_W + lane] = sum_w
            state[SUM_X + lane] = sum_x


@njit(cache=True, nogil=True, error_model="numpy")
def _is_regular(state, lane):
    # Whether all v of the lane are numbers to `nearest_int`, and grow with x; of a flat lane no v matters.
    smallest, inverse = state[SMALLEST + lane], state[INVERSE + lane]
    first = np.float32(inverse * np.float32(state[LEAST + lane] - smallest))
    last = np.float32(inverse * np.float32(state[LARGEST + lane] - smallest))
    return ((inverse > 0) & (first > -LIMIT) & (last < LIMIT)) | (state[ERROR + lane] < 0)


@njit(cache=True, nogil=True, error_model="numpy")
def _project(tile, weights, quants, state, divisor, top):
    # Quants of a candidate, and their weighted sums.
    n_regular = np.int32(0)
    for lane in range(LANES):
        spread = np.float32(state[LARGEST + lane] - state[SMALLEST + lane])
        state[INVERSE + lane] = np.float32(divisor / spread)
        state[SUM_L + lane] = np.float32(0.0)
        state[SUM_L2 + lane] = np.float32(0.0)
        state[SUM_XL + lane] = np.float32(0.0)
        n_regular = np.int32(n_regular + np.int32(_is_regular(state, lane)))
    if (
        not is_arm64()
    ):  # quants before sums: what waits for a sum fills the schedulers of AVX2's processors
        for i in range(0, 32, 8):
            for lane in range(LANES):
                smallest = state[SMALLEST + lane]
                inverse = state[INVERSE + lane]
                for k in range(8):
                    v = np.float32(inverse * np.float32(tile[(i + k) * LANES + lane] - smallest))
                    quants[(i + k) * LANES + lane] = _regular_level(v, top)
    for i in range(0, 32, 8):
        for lane in range(LANES):
            smallest = state[SMALLEST + lane]
            inverse = state[INVERSE + lane]
            sum_l = state[SUM_L + lane]
            sum_l2 = state[SUM_L2 + lane]
            sum_xl = state[SUM_XL + lane]
            for k in range(8):
                x = tile[(i + k) * LANES + lane]
                if is_arm64():  # which has registers for all
                    v = np.float32(inverse * np.float32(x - smallest))
                    quants[(i + k) * LANES + lane] = _regular_level(v, top)
                level = quants[(i + k) * LANES + lane]
                wl = np.float32(weights[(i + k) * LANES + lane] * level)
                sum_l = np.float32(sum_l + wl)
                sum_l2 = np.float32(sum_l2 + np.float32(wl * level))
                sum_xl = np.float32(sum_xl + np.float32(wl * x))
            state[SUM_L + lane] = sum_l
            state[SUM_L2 + lane] = sum_l2
            state[SUM_XL + lane] = sum_xl
    if n_regular < LANES:
        for lane in range(LANES):
            if not _is_regular(state, lane):
                _project_lane(tile, weights, quants, state, lane, top)


@njit(cache=True, nogil=True, error_model="numpy")
def _project_lane(tile, weights, quants, state, lane, top):
    # The same for a lane of extremes.
    sum_l = sum_l2 = sum_xl = np.float32(0.0)
    for at in range(lane, tile.size, LANES):
        x = tile[at]
        v = np.float32(x - state[SMALLEST + lane])
        level = _level(np.float32(state[INVERSE + lane] * v), top)
        quants[at] = level
        wl = np.float32(weights[at] * level)
        sum_l = np.float32(sum_l + wl)
        sum_l2 = np.float32(sum_l2 + np.float32(wl * level))
        sum_xl = np.float32(sum_xl + np.float32(wl * x))
    state[SUM_L + lane] = sum_l
    state[SUM_L2 + lane] = sum_l2
    state[SUM_XL + lane] = sum_xl


@njit(cache=True, nogil=True, error_model="numpy")
def solve(state):
    """Fit scale and minimum to a candidate's quants by weighted least squares; the minimum is not positive.

    Parameters
    ----------
    state : (17 * LANES,) float32
        SUM_W to SUM_XL are read; NEW_SCALE and NEW_MIN are written, and NEW_ERROR begins at zero
    """
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
    for i in range(0, 32, 16):
        for lane in range(LANES):
            scale = state[NEW_SCALE + lane]
            minimum = state[NEW_MIN + lane]
            error = state[NEW_ERROR + lane]
            for k in range(16):
                x = tile[(i + k) * LANES + lane]
                diff = np.float32(scale * quants[(i + k) * LANES + lane])
                diff = np.float32(np.float32(diff + minimum) - x)
                w = weights[(i + k) * LANES + lane]
                error = np.float32(error + np.float32(w * np.float32(diff * diff)))
            state[NEW_ERROR + lane] = error
    keep_better(state, is_first)


@njit(cache=True, nogil=True, error_model="numpy")
def keep_better(state, is_first):
    """Keep the candidate where its error is less than that of the best fit so far.

    Parameters
    ----------
    state : (17 * LANES,) float32
        the best fit is overwritten where the candidate is better, SUM_L everywhere
    is_first : bool
        whether there is no fit yet
    """
    # By masks that are read back from a row which is free by now. Where a row chooses between itself
    # and another LLVM stores under a mask, which takes AMD's processors with AVX2 a dozen cycles.
    for lane in range(LANES):
        better = is_first or state[NEW_ERROR + lane] < state[ERROR + lane]
        mask = np.int32(-np.int32(better))
        state[SUM_L + lane] = np.int32(mask).view(np.float32)
        state[ERROR + lane] = state[NEW_ERROR + lane] if better else state[ERROR + lane]
    for lane in range(LANES):
        mask = state[SUM_L + lane]
        smallest = state[SMALLEST + lane]
        state[FIT_INVERSE + lane] = _choose(mask, state[INVERSE + lane], state[FIT_INVERSE + lane])
        state[FIT_MIN + lane] = _choose(mask, smallest, state[FIT_MIN + lane])
        state[SMALLEST + lane] = _choose(mask, state[NEW_MIN + lane], smallest)
        state[SCALE + lane] = _choose(mask, state[NEW_SCALE + lane], state[SCALE + lane])


@njit(cache=True, nogil=True, error_model="numpy")
def _choose(mask, x, y):
    # x where the mask's bits are set, else y.
    mask_bits = np.float32(mask).view(np.int32)
    x_bits = np.int32(np.float32(x).view(np.int32) & mask_bits)
    y_bits = np.int32(np.float32(y).view(np.int32) & ~mask_bits)
    return np.int32(x_bits | y_bits).view(np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def _fit_range(tile, weights, quants, state, top):
    # First fit: the quants span the range of the lane, and zero.
    for lane in range(LANES):
        smallest = state[SMALLEST + lane]
        state[SMALLEST + lane] = np.float32(0.0) if smallest > 0 else smallest
        state[ERROR + lane] = np.float32(0.0)
    _project(tile, weights, quants, state, top, top)
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
def write_head(state, first_lane, block):
    """Write d, dmin and the eight 6-bit scales and minima of a block.

    Parameters
    ----------
    state : (17 * LANES,) float32
        what `search_tile` left from STATE on
    first_lane : int
        of the block's first sub-block
    block : (>= 16,) uint8
        its first bytes are written
    """
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
                sub_levels[k] = _level(np.float32(np.float32(sub[k] + offset) / step), top)
        else:  # ggml leaves the quants of the search in place
            inverse = inverses[j]
            smallest = minima[j]
            for k in range(sub.size):
                sub_levels[k] = _level(np.float32(inverse * np.float32(sub[k] - smallest)), top)
