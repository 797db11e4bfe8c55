"""The search for scales and minima of Q4_K and Q5_K, in part of Q2_K.

Super-blocks of 256 values, eight sub-blocks of 32, each with its own scale and minimum. The search is that
of ggml's quantize_row_q4_K_ref and quantize_row_q5_K_ref (make_qkx2_quants), bit for bit, turned on its
side: 64 sub-blocks stand beside each other, tile[element, lane], and every loop runs over lanes. Each lane
adds in the order of ggml's scalar code, so the sums are the same, and the compiler can use SIMD without
reordering a sum: 12 times ggml's speed with AVX-512, 9 with AVX2. A last tile is computed whole; what stands
in its unused lanes is never written out.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.lanes import put_beside
from edgemerge.kernels.llvm import is_arm64
from edgemerge.kernels.scalars import nearest_int

LANES = 64
HALF = (
    LANES // 2
)  # two lanes are added up beside each other: a sum waits for itself most of the time
LIMIT = np.float32(1 << 22)

# Rows of LANES float32 in the scratch, after the 32 rows of the tile, of its weights and of its quants.
WEIGHT = 0 * LANES  # root mean square; |x| is added to it to weigh an error
SUM_W = 1 * LANES
SUM_X = 2 * LANES  # weighted, like the sums below
LARGEST = 3 * LANES
LEAST = 4 * LANES  # value of the lane
INVERSE = 5 * LANES  # 1 / scale of the candidate
SUM_L = 6 * LANES  # of its quants, l in ggml's code
SUM_L2 = 7 * LANES
SUM_XL = 8 * LANES
NEW_SCALE = 9 * LANES  # least squares for those quants
NEW_MIN = 10 * LANES
NEW_ERROR = 11 * LANES
STATE = (32 + 32 + 32) * LANES
STATE_LEN = 12 * LANES

# Rows of the best fit so far, which are there twice: `keep_better` reads one and writes the other.
SMALLEST = 0 * LANES  # minimum, never positive
SCALE = 1 * LANES
ERROR = 2 * LANES  # weighted and squared
FIT_INVERSE = 3 * LANES  # its quants: round(FIT_INVERSE * (x - FIT_MIN))
FIT_MIN = 4 * LANES
FIT = STATE + STATE_LEN
FIT_LEN = 5 * LANES
SCRATCH_LEN = FIT + 2 * FIT_LEN


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
        overwritten; from FIT on it holds rows of one number a lane: SCALE, SMALLEST, FIT_INVERSE, FIT_MIN
    """
    tile = scratch[: 32 * LANES]
    weights = scratch[32 * LANES : 64 * LANES]
    quants = scratch[64 * LANES : 96 * LANES]
    state = scratch[STATE : STATE + STATE_LEN]
    fit, other = two_fits(scratch[FIT:SCRATCH_LEN], n_steps)
    put_beside(x, first, n_lanes, 32, tile, LANES)
    _measure(tile, weights, state, fit)
    _fit_range(tile, weights, quants, state, fit, top)
    for step in range(n_steps):
        tenths = np.float32(np.float32(0.1) * np.float32(step))
        divisor = np.float32(np.float32(first_step + tenths) + top)
        _project(tile, weights, quants, state, fit, divisor, top, False)
        solve(state)
        _measure_error(tile, weights, quants, state)
        keep_better(state, fit, other)
        fit, other = other, fit


@njit(cache=True, nogil=True, error_model="numpy")
def two_fits(rows, n_steps):
    """Give the rows of the first fit and those of the next one: after so many steps the last is in front.

    Parameters
    ----------
    rows : (>= 2 * FIT_LEN,) float32
        scratch
    n_steps : int
        candidates
    """
    front, back = rows[:FIT_LEN], rows[FIT_LEN : 2 * FIT_LEN]
    return (back, front) if n_steps % 2 else (front, back)


@njit(cache=True, nogil=True, error_model="numpy")
def level_of(v, top):
    """Round to a quant from 0 to `top`, as ggml does."""
    return np.float32(min(max(nearest_int(v), np.int32(0)), np.int32(top)))


@njit(cache=True, nogil=True, error_model="numpy")
def _low_level(v):
    # The same for -LIMIT < v < top + 0.5, without leaving the registers of vectors. The bits of positive
    # floats grow with them, and LLVM makes one instruction of a maximum of integers on NEON, not of floats.
    positive = np.int32(max(np.int32(np.float32(v).view(np.int32)), np.int32(0)))
    return np.float32(np.rint(positive.view(np.float32)))


@njit(cache=True, nogil=True, error_model="numpy")
def _regular_level(v, top):
    # The same for -LIMIT < v < LIMIT.
    top_bits = np.int32(np.float32(top).view(np.int32))
    level_bits = np.int32(np.float32(_low_level(v)).view(np.int32))
    return np.int32(min(level_bits, top_bits)).view(np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def _measure(tile, weights, state, fit):
    # Weights, their sums and the range of each lane.
    for lane in range(LANES):
        state[WEIGHT + lane] = np.float32(0.0)
        state[SUM_W + lane] = np.float32(0.0)
        state[SUM_X + lane] = np.float32(-0.0)  # changes nothing: ggml starts with the first term
        fit[SMALLEST + lane] = tile[lane]
        state[LARGEST + lane] = tile[lane]
    # Eight elements a turn: sums stay in registers for so long, and LLVM unrolls the inner loop.
    for i in range(0, 32, 8):
        for lane in range(LANES):
            smallest = fit[SMALLEST + lane]
            largest = state[LARGEST + lane]
            squares = state[WEIGHT + lane]
            for k in range(8):
                x = tile[(i + k) * LANES + lane]
                smallest = x if x < smallest else smallest
                largest = x if x > largest else largest
                squares = np.float32(squares + np.float32(x * x))
            fit[SMALLEST + lane] = smallest
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
def _is_regular(state, fit, lane):
    # Whether all v of the lane are numbers to `nearest_int`, and grow with x; of a flat lane no v matters.
    smallest, inverse = fit[SMALLEST + lane], state[INVERSE + lane]
    first = np.float32(inverse * np.float32(state[LEAST + lane] - smallest))
    last = np.float32(inverse * np.float32(state[LARGEST + lane] - smallest))
    return ((inverse > 0) & (first > -LIMIT) & (last < LIMIT)) | (fit[ERROR + lane] < 0)


@njit(cache=True, nogil=True, error_model="numpy")
def _project(tile, weights, quants, state, fit, divisor, top, is_first):
    # Quants of a candidate, and their weighted sums.
    n_regular = np.int32(0)
    for lane in range(LANES):
        spread = np.float32(state[LARGEST + lane] - fit[SMALLEST + lane])
        state[INVERSE + lane] = np.float32(divisor / spread)
        state[SUM_L + lane] = np.float32(0.0)
        state[SUM_L2 + lane] = np.float32(0.0)
        state[SUM_XL + lane] = np.float32(0.0)
        n_regular = np.int32(n_regular + np.int32(_is_regular(state, fit, lane)))
    is_uncut = divisor <= top + np.float32(0.4)  # the largest value is at the divisor: no cut there
    if is_arm64():  # which has registers for all
        if is_uncut:
            _quantize_and_sum(tile, weights, quants, state, fit, top, False)
        else:
            _quantize_and_sum(tile, weights, quants, state, fit, top, True)
    else:  # what waits for a sum would fill the schedulers of AVX2's processors
        if is_uncut:
            for i in range(0, 32, 8):
                for lane in range(LANES):
                    smallest, inverse = fit[SMALLEST + lane], state[INVERSE + lane]
                    for k in range(8):
                        x = tile[(i + k) * LANES + lane]
                        level = _low_level(np.float32(inverse * np.float32(x - smallest)))
                        quants[(i + k) * LANES + lane] = level
        else:
            for i in range(0, 32, 8):
                for lane in range(LANES):
                    smallest, inverse = fit[SMALLEST + lane], state[INVERSE + lane]
                    for k in range(8):
                        x = tile[(i + k) * LANES + lane]
                        level = _regular_level(np.float32(inverse * np.float32(x - smallest)), top)
                        quants[(i + k) * LANES + lane] = level
        if not is_first:
            for i in range(0, 32, 8):
                for lane in range(HALF):
                    sum_l, other_l = state[SUM_L + lane], state[SUM_L + HALF + lane]
                    sum_l2, other_l2 = state[SUM_L2 + lane], state[SUM_L2 + HALF + lane]
                    sum_xl, other_xl = state[SUM_XL + lane], state[SUM_XL + HALF + lane]
                    for k in range(8):
                        at = (i + k) * LANES + lane
                        x, level = tile[at], quants[at]
                        wl = np.float32(weights[at] * level)
                        sum_l = np.float32(sum_l + wl)
                        sum_l2 = np.float32(sum_l2 + np.float32(wl * level))
                        sum_xl = np.float32(sum_xl + np.float32(wl * x))
                        at += HALF
                        x, level = tile[at], quants[at]
                        wl = np.float32(weights[at] * level)
                        other_l = np.float32(other_l + wl)
                        other_l2 = np.float32(other_l2 + np.float32(wl * level))
                        other_xl = np.float32(other_xl + np.float32(wl * x))
                    state[SUM_L + lane], state[SUM_L + HALF + lane] = sum_l, other_l
                    state[SUM_L2 + lane], state[SUM_L2 + HALF + lane] = sum_l2, other_l2
                    state[SUM_XL + lane], state[SUM_XL + HALF + lane] = sum_xl, other_xl
    if n_regular < LANES:
        for lane in range(LANES):
            if not _is_regular(state, fit, lane):
                _project_lane(tile, weights, quants, state, fit, lane, top)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _quantize_and_sum(tile, weights, quants, state, fit, top, cuts_top):
    # Inlined by Numba, so that each call has a loop of its own.
    for i in range(0, 32, 8):
        for lane in range(LANES):
            smallest, inverse = fit[SMALLEST + lane], state[INVERSE + lane]
            sum_l, sum_l2 = state[SUM_L + lane], state[SUM_L2 + lane]
            sum_xl = state[SUM_XL + lane]
            for k in range(8):
                x = tile[(i + k) * LANES + lane]
                v = np.float32(inverse * np.float32(x - smallest))
                level = _regular_level(v, top) if cuts_top else _low_level(v)
                quants[(i + k) * LANES + lane] = level
                wl = np.float32(weights[(i + k) * LANES + lane] * level)
                sum_l = np.float32(sum_l + wl)
                sum_l2 = np.float32(sum_l2 + np.float32(wl * level))
                sum_xl = np.float32(sum_xl + np.float32(wl * x))
            state[SUM_L + lane], state[SUM_L2 + lane] = sum_l, sum_l2
            state[SUM_XL + lane] = sum_xl


@njit(cache=True, nogil=True, error_model="numpy")
def _project_lane(tile, weights, quants, state, fit, lane, top):
    # The same for a lane of extremes.
    sum_l = sum_l2 = sum_xl = np.float32(0.0)
    for at in range(lane, tile.size, LANES):
        x = tile[at]
        v = np.float32(x - fit[SMALLEST + lane])
        level = level_of(np.float32(state[INVERSE + lane] * v), top)
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
    state : (STATE_LEN,) float32
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
def _measure_error(tile, weights, quants, state):
    # Error of a candidate.
    if is_arm64():  # where two lanes at once take a tenth more instructions
        for i in range(0, 32, 16):
            for lane in range(LANES):
                scale, minimum = state[NEW_SCALE + lane], state[NEW_MIN + lane]
                error = state[NEW_ERROR + lane]
                for k in range(16):
                    at = (i + k) * LANES + lane
                    diff = np.float32(np.float32(scale * quants[at]) + minimum)
                    diff = np.float32(diff - tile[at])
                    error = np.float32(error + np.float32(weights[at] * np.float32(diff * diff)))
                state[NEW_ERROR + lane] = error
        return
    for i in range(0, 32, 8):
        for lane in range(HALF):
            scale, other_scale = state[NEW_SCALE + lane], state[NEW_SCALE + HALF + lane]
            minimum, other_min = state[NEW_MIN + lane], state[NEW_MIN + HALF + lane]
            error, other_error = state[NEW_ERROR + lane], state[NEW_ERROR + HALF + lane]
            for k in range(8):
                at = (i + k) * LANES + lane
                diff = np.float32(np.float32(np.float32(scale * quants[at]) + minimum) - tile[at])
                error = np.float32(error + np.float32(weights[at] * np.float32(diff * diff)))
                at += HALF
                diff = np.float32(np.float32(other_scale * quants[at]) + other_min)
                diff = np.float32(diff - tile[at])
                diff = np.float32(weights[at] * np.float32(diff * diff))
                other_error = np.float32(other_error + diff)
            state[NEW_ERROR + lane], state[NEW_ERROR + HALF + lane] = error, other_error


@njit(cache=True, nogil=True, error_model="numpy")
def keep_better(state, fit, other):
    """Write the better of a candidate and the best fit so far: the candidate where its error is less.

    Parameters
    ----------
    state : (STATE_LEN,) float32
        the candidate
    fit : (FIT_LEN,) float32
        the best fit
    other : (FIT_LEN,) float32
        written
    """
    # Where a row chooses between itself and another LLVM may store under a mask, which takes AMD's processors
    # with AVX2 a dozen cycles. Masks of bits keep it from branches.
    for lane in range(LANES):
        better = state[NEW_ERROR + lane] < fit[ERROR + lane]
        mask = np.int32(-np.int32(better))
        smallest = fit[SMALLEST + lane]
        other[ERROR + lane] = _choose(mask, state[NEW_ERROR + lane], fit[ERROR + lane])
        other[FIT_INVERSE + lane] = _choose(mask, state[INVERSE + lane], fit[FIT_INVERSE + lane])
        other[FIT_MIN + lane] = _choose(mask, smallest, fit[FIT_MIN + lane])
        other[SMALLEST + lane] = _choose(mask, state[NEW_MIN + lane], smallest)
        other[SCALE + lane] = _choose(mask, state[NEW_SCALE + lane], fit[SCALE + lane])


@njit(cache=True, nogil=True, error_model="numpy")
def _choose(mask, x, y):
    # x where the mask's bits are set, else y.
    x_bits = np.int32(np.float32(x).view(np.int32) & mask)
    y_bits = np.int32(np.float32(y).view(np.int32) & ~mask)
    return np.int32(x_bits | y_bits).view(np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def _fit_range(tile, weights, quants, state, fit, top):
    # First fit: the quants span the range of the lane, and zero.
    for lane in range(LANES):
        smallest = fit[SMALLEST + lane]
        fit[SMALLEST + lane] = np.float32(0.0) if smallest > 0 else smallest
        fit[ERROR + lane] = np.float32(0.0)
    _project(tile, weights, quants, state, fit, top, top, True)
    for lane in range(LANES):
        state[NEW_SCALE + lane] = np.float32(np.float32(1.0) / state[INVERSE + lane])
        state[NEW_MIN + lane] = fit[SMALLEST + lane]
        state[NEW_ERROR + lane] = np.float32(0.0)
    _measure_error(tile, weights, quants, state)
    set_first_fit(state, fit)


@njit(cache=True, nogil=True, error_model="numpy")
def set_first_fit(state, fit):
    """Take a candidate for the best fit; a flat lane has scale 0 and quants 0 for good.

    Parameters
    ----------
    state : (STATE_LEN,) float32
        the candidate
    fit : (FIT_LEN,) float32
        its SMALLEST is read, the others are written
    """
    for lane in range(LANES):
        flat = state[LARGEST + lane] == fit[SMALLEST + lane]
        fit[SCALE + lane] = np.float32(0.0) if flat else state[NEW_SCALE + lane]
        # No candidate has an error below -1.
        fit[ERROR + lane] = np.float32(-1.0) if flat else state[NEW_ERROR + lane]
        fit[FIT_INVERSE + lane] = np.float32(0.0) if flat else state[INVERSE + lane]
        fit[FIT_MIN + lane] = fit[SMALLEST + lane]
