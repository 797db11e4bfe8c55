"""Q2_K: super-blocks of 256 values, sixteen sub-blocks of 16, each with its own scale and minimum.

value = d * scale * q - dmin * minimum, with q of 2 bits, scale and minimum of 4 bits. Block of 84
bytes (ggml-common.h, block_q2_K): 16 bytes with a scale below and a minimum above, 64 bytes of
quants, d and dmin as binary16. Each half of the block holds four runs of 32 quants in 32 bytes, run
r in bits 2 r and 2 r + 1.

The encoder is ggml's quantize_row_q2_K_ref, bit for bit, turned on its side as affine_search.py explains: 64
sub-blocks stand beside each other, tile[element, lane], and every loop runs over lanes: 11 times
ggml's speed with AVX-512, 8 with AVX2.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.affine_search import (
    FIT_INVERSE,
    FIT_LEN,
    FIT_MIN,
    INVERSE,
    LANES,
    LARGEST,
    NEW_ERROR,
    NEW_MIN,
    NEW_SCALE,
    SCALE,
    SMALLEST,
    STATE_LEN,
    SUM_L,
    SUM_L2,
    SUM_W,
    SUM_X,
    SUM_XL,
    keep_better,
    set_first_fit,
    solve,
    two_fits,
)
from edgemerge.kernels.lanes import put_beside
from edgemerge.kernels.scalars import float_to_half, half_to_float, nearest_int

TOP = 3  # largest quant
STEPS = 16  # candidate scales of the search
FIRST = -0.5  # what the first candidate adds to TOP; each further one adds 0.1

STATE = (16 + 16) * LANES  # after the tile and its quants; WEIGHT and LEAST are not used
FIT = STATE + STATE_LEN
SCRATCH_LEN = FIT + 2 * FIT_LEN


@njit(cache=True, nogil=True, error_model="numpy")
def _step_and_offset(d, dmin, code):
    step = np.float32(d * np.float32(np.int32(code & 15)))
    return step, np.float32(dmin * np.float32(np.int32(code >> 4)))


@njit(cache=True, nogil=True, error_model="numpy")
def decode_q2_k(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_q2_K).

    Parameters
    ----------
    raw_u8 : (n_blocks * 84,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 256,) float32
        written
    """
    for i in range(raw_u8.size // 84):
        block = raw_u8[84 * i : 84 * i + 84]
        d = half_to_float(block[80], block[81])
        dmin = half_to_float(block[82], block[83])
        for j in range(4):
            # Four sub-blocks that share their bytes, every other one
            first = 8 * (j >> 1) + (j & 1)
            d0, m0 = _step_and_offset(d, dmin, block[first])
            d1, m1 = _step_and_offset(d, dmin, block[first + 2])
            d2, m2 = _step_and_offset(d, dmin, block[first + 4])
            d3, m3 = _step_and_offset(d, dmin, block[first + 6])
            quants = block[16 + 16 * j : 32 + 16 * j]
            y = out_f32[256 * i + 16 * first : 256 * i + 16 * first + 112]
            for k in range(16):
                q = np.int32(quants[k])
                y[k] = d0 * np.float32(np.int32(q & 3)) - m0
                y[32 + k] = d1 * np.float32(np.int32(q >> 2 & 3)) - m1
                y[64 + k] = d2 * np.float32(np.int32(q >> 4 & 3)) - m2
                y[96 + k] = d3 * np.float32(np.int32(q >> 6)) - m3


@njit(cache=True, nogil=True, error_model="numpy")
def _level(v):
    return np.float32(min(max(nearest_int(v), np.int32(0)), np.int32(TOP)))


@njit(cache=True, nogil=True, error_model="numpy")
def _measure(tile, state, fit):
    # Sums of the weights and the range of each lane.
    for lane in range(LANES):
        state[SUM_W + lane] = np.float32(0.0)
        state[SUM_X + lane] = np.float32(-0.0)  # changes nothing: ggml starts with the first term
        fit[SMALLEST + lane] = tile[lane]
        state[LARGEST + lane] = tile[lane]
    # Eight elements a turn: sums stay in registers for so long, and LLVM unrolls the inner loop.
    for i in range(0, 16, 8):
        for lane in range(LANES):
            smallest = fit[SMALLEST + lane]
            largest = state[LARGEST + lane]
            for k in range(8):
                x = tile[(i + k) * LANES + lane]
                w = np.float32(abs(x))
                smallest = x if x < smallest else smallest
                largest = x if x > largest else largest
                state[SUM_W + lane] += w
                state[SUM_X + lane] += np.float32(w * x)
            fit[SMALLEST + lane] = smallest
            state[LARGEST + lane] = largest


@njit(cache=True, nogil=True, error_model="numpy")
def _fit_range(tile, state, fit):
    # First fit: the quants span the range of the lane, and zero.
    for lane in range(LANES):
        smallest = fit[SMALLEST + lane]
        smallest = np.float32(0.0) if smallest > 0 else smallest
        inverse = np.float32(np.float32(TOP) / np.float32(state[LARGEST + lane] - smallest))
        fit[SMALLEST + lane] = smallest
        state[INVERSE + lane] = inverse
        state[NEW_SCALE + lane] = np.float32(np.float32(1.0) / inverse)
        state[NEW_ERROR + lane] = np.float32(0.0)
    for i in range(0, 16, 8):
        for lane in range(LANES):
            smallest = fit[SMALLEST + lane]
            error = state[NEW_ERROR + lane]
            for k in range(8):
                x = tile[(i + k) * LANES + lane]
                level = _level(np.float32(state[INVERSE + lane] * np.float32(x - smallest)))
                diff = np.float32(np.float32(state[NEW_SCALE + lane] * level) + smallest - x)
                error = np.float32(error + np.float32(np.float32(abs(x)) * abs(diff)))
            state[NEW_ERROR + lane] = error
    set_first_fit(state, fit)


@njit(cache=True, nogil=True, error_model="numpy")
def _project(tile, quants, state, fit, divisor):
    # Quants of a candidate, and their weighted sums.
    for lane in range(LANES):
        spread = np.float32(state[LARGEST + lane] - fit[SMALLEST + lane])
        state[INVERSE + lane] = np.float32(divisor / spread)
        state[SUM_L + lane] = np.float32(0.0)
        state[SUM_L2 + lane] = np.float32(0.0)
        state[SUM_XL + lane] = np.float32(0.0)
    for i in range(0, 16, 8):
        for lane in range(LANES):
            sum_l = state[SUM_L + lane]
            sum_l2 = state[SUM_L2 + lane]
            sum_xl = state[SUM_XL + lane]
            for k in range(8):
                x = tile[(i + k) * LANES + lane]
                v = np.float32(x - fit[SMALLEST + lane])
                level = _level(np.float32(state[INVERSE + lane] * v))
                quants[(i + k) * LANES + lane] = level
                wl = np.float32(np.float32(abs(x)) * level)
                sum_l = np.float32(sum_l + wl)
                sum_l2 = np.float32(sum_l2 + np.float32(wl * level))
                sum_xl = np.float32(sum_xl + np.float32(wl * x))
            state[SUM_L + lane] = sum_l
            state[SUM_L2 + lane] = sum_l2
            state[SUM_XL + lane] = sum_xl


@njit(cache=True, nogil=True, error_model="numpy")
def _measure_error(tile, quants, state):
    # Error of a candidate.
    for i in range(0, 16, 8):
        for lane in range(LANES):
            error = state[NEW_ERROR + lane]
            for k in range(8):
                x = tile[(i + k) * LANES + lane]
                diff = np.float32(state[NEW_SCALE + lane] * quants[(i + k) * LANES + lane])
                diff = np.float32(np.float32(diff + state[NEW_MIN + lane]) - x)
                error = np.float32(error + np.float32(np.float32(abs(x)) * abs(diff)))
            state[NEW_ERROR + lane] = error


@njit(cache=True, nogil=True, error_model="numpy")
def _write_header(fit, first_lane, block):
    # The sixteen 4-bit scales and minima, d and dmin.
    max_scale = np.float32(0.0)
    max_min = np.float32(0.0)
    for lane in range(first_lane, first_lane + 16):
        scale = fit[SCALE + lane]
        minimum = np.float32(-fit[SMALLEST + lane])
        max_scale = scale if scale > max_scale else max_scale
        max_min = minimum if minimum > max_min else max_min
    inv_scale = np.float32(np.float32(15.0) / max_scale) if max_scale > 0 else np.float32(0.0)
    inv_min = np.float32(np.float32(15.0) / max_min) if max_min > 0 else np.float32(0.0)
    for j in range(16):
        lane = first_lane + j
        scale_q = nearest_int(np.float32(inv_scale * fit[SCALE + lane]))
        min_q = nearest_int(np.float32(inv_min * np.float32(-fit[SMALLEST + lane])))
        block[j] = np.uint8((scale_q | min_q << 4) & 255)  # not clamped: ggml trusts the division
    half = float_to_half(np.float32(max_scale / np.float32(15.0)))
    block[80] = half & 255
    block[81] = half >> 8
    half = float_to_half(np.float32(max_min / np.float32(15.0)))
    block[82] = half & 255
    block[83] = half >> 8


@njit(cache=True, nogil=True, error_model="numpy")
def _write_quants(x, inverses, minima, levels, block):
    # Quants for the scales as they were rounded.
    d = half_to_float(block[80], block[81])
    dmin = half_to_float(block[82], block[83])
    for j in range(16):
        code = np.int32(block[j])
        step = np.float32(d * np.float32(np.int32(code & 15)))
        offset = np.float32(dmin * np.float32(np.int32(code >> 4)))
        sub = x[16 * j : 16 * j + 16]
        sub_levels = levels[16 * j : 16 * j + 16]
        if step != 0:
            for k in range(sub.size):
                sub_levels[k] = _level(np.float32(np.float32(sub[k] + offset) / step))
        else:  # ggml leaves the quants of the search in place
            inverse = inverses[j]
            smallest = minima[j]
            for k in range(sub.size):
                sub_levels[k] = _level(np.float32(inverse * np.float32(sub[k] - smallest)))
    for j in range(2):
        runs = levels[128 * j : 128 * j + 128]
        quants = block[16 + 32 * j : 48 + 32 * j]
        for k in range(quants.size):
            low = np.int32(runs[k]) | np.int32(runs[32 + k]) << 2
            quants[k] = np.uint8(low | np.int32(runs[64 + k]) << 4 | np.int32(runs[96 + k]) << 6)


@njit(cache=True, nogil=True, error_model="numpy")
def write_quants_q2_k(x_f32, inverses_f32, minima_f32, levels_f32, out_u8):
    """Write the quants of blocks whose scales and minima are written already.

    Parameters
    ----------
    x_f32 : (n_blocks * 256,) float32
        finite values
    inverses_f32, minima_f32 : (n_blocks * 16,) float32
        of the sub-blocks whose scale is zero: quants are round(inverse * (x - minimum))
    levels_f32 : (>= 256,) float32
        overwritten
    out_u8 : (n_blocks * 84,) uint8
        the quants are written
    """
    for i in range(out_u8.size // 84):
        inverses = inverses_f32[16 * i : 16 * i + 16]
        minima = minima_f32[16 * i : 16 * i + 16]
        block = out_u8[84 * i : 84 * i + 84]
        _write_quants(x_f32[256 * i : 256 * i + 256], inverses, minima, levels_f32, block)


@njit(cache=True, nogil=True, error_model="numpy")
def encode_q2_k(x_f32, scratch_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_q2_K_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 256,) float32
        finite values
    scratch_f32 : (>= SCRATCH_LEN,) float32
        overwritten
    out_u8 : (n_blocks * 84,) uint8
        written
    """
    tile = scratch_f32[: 16 * LANES]
    quants = scratch_f32[16 * LANES : 32 * LANES]
    state = scratch_f32[STATE : STATE + STATE_LEN]
    n_sub = x_f32.size // 16
    for first in range(0, n_sub, LANES):
        n_lanes = min(LANES, n_sub - first)
        put_beside(x_f32, first, n_lanes, 16, tile, LANES)
        fit, other = two_fits(scratch_f32[FIT:SCRATCH_LEN], STEPS)
        _measure(tile, state, fit)
        _fit_range(tile, state, fit)
        for step in range(STEPS):
            tenths = np.float32(np.float32(0.1) * np.float32(step))
            divisor = np.float32(np.float32(np.float32(FIRST) + tenths) + np.float32(TOP))
            _project(tile, quants, state, fit, divisor)
            solve(state)
            _measure_error(tile, quants, state)
            keep_better(state, fit, other)
            fit, other = other, fit
        for lane in range(0, n_lanes, 16):
            i = (first + lane) // 16
            x = x_f32[256 * i : 256 * i + 256]
            block = out_u8[84 * i : 84 * i + 84]
            _write_header(fit, lane, block)
            inverses = fit[FIT_INVERSE + lane : FIT_INVERSE + lane + 16]
            minima = fit[FIT_MIN + lane : FIT_MIN + lane + 16]
            _write_quants(x, inverses, minima, quants, block)
