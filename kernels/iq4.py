"""IQ4_NL and IQ4_XS: 4-bit quants that number sixteen uneven levels, LEVELS.

IQ4_NL: value = d * LEVELS[q]. Block of 18 bytes for 32 values (ggml-common.h, block_iq4_nl): d as
binary16, then 16 bytes; the low half of byte j is quant j, its high half quant j + 16.

IQ4_XS: super-blocks of 256 values, eight sub-blocks of 32; value = d * (scale - 32) * LEVELS[q], with
a scale of 6 bits. Block of 136 bytes (block_iq4_xs): d as binary16; 2 bytes with the upper two bits
of scale j in bits 2 j and 2 j + 1; 4 bytes with the lower four, of scale 2 j below and of 2 j + 1
above in byte j; 16 bytes of quants for each sub-block, as in IQ4_NL.

The encoder is ggml's quantize_row_iq4_nl_impl, bit for bit, turned on its side as q6_k.py explains:
64 sub-blocks stand beside each other, tile[element, lane], and every loop runs over lanes. Errors are
weighted by the squares of the values, or with an importance matrix as importance.py says. 26 times
ggml's speed with AVX-512, 15 with AVX2.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.lanes import put_beside
from edgemerge.kernels.scalars import float_to_half, half_to_float, nearest_int

LANES = 64
REACH = 7  # the search tries scales from this many steps below the extreme to as many above
EPSILON = np.float32(1e-15)  # ggml's GROUP_MAX_EPS: what is smaller counts as zero
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
WORDS = tuple(  # kvalues_iq4nl, the first of four in the lowest byte
    int(np.array(LEVELS[i : i + 4], np.int8).view(np.dtype("<i4"))[0]) for i in range(0, 16, 4)
)

# Rows of LANES float32 in the scratch, after the 32 rows of the tile and the 32 of its weights.
EXTREME = 0 * LANES  # value of largest magnitude, with its sign
SCALE = 1 * LANES  # scale of the best fit so far
QUALITY = 2 * LANES  # its scale times its sum of x q; a better fit has more
INVERSE = 3 * LANES  # 1 / scale of the candidate
SUM_XQ = 4 * LANES  # of its levels; weighted
SUM_Q2 = 5 * LANES
SCRATCH_LEN = (32 + 32 + 6) * LANES


@njit(cache=True, nogil=True, error_model="numpy")
def _level_of(q):
    # LEVELS[q]: four of them stand in each word, and a shift brings the one wanted to the top. Looked up
    # in a table one by one they take six times as long, as LLVM makes no shuffle of it.
    below = WORDS[1] if q & 4 else WORDS[0]
    above = WORDS[3] if q & 4 else WORDS[2]
    word = np.int32(above if q & 8 else below)
    return np.float32(np.int32(np.int32(word << np.int32(24 - 8 * (q & 3))) >> 24))


@njit(cache=True, nogil=True, error_model="numpy")
def _decode_run(quants, step, y):
    # 16 bytes -> 32 values
    for j in range(16):
        q = np.int32(quants[j])
        y[j] = step * _level_of(np.int32(q & 15))
        y[16 + j] = step * _level_of(np.int32(q >> 4))


@njit(cache=True, nogil=True, error_model="numpy")
def decode_iq4_nl(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_iq4_nl).

    Parameters
    ----------
    raw_u8 : (n_blocks * 18,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 32,) float32
        written
    """
    for i in range(raw_u8.size // 18):
        block = raw_u8[18 * i : 18 * i + 18]
        d = half_to_float(block[0], block[1])
        _decode_run(block[2:18], d, out_f32[32 * i : 32 * i + 32])


@njit(cache=True, nogil=True, error_model="numpy")
def decode_iq4_xs(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_iq4_xs).

    Parameters
    ----------
    raw_u8 : (n_blocks * 136,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 256,) float32
        written
    """
    for i in range(raw_u8.size // 136):
        block = raw_u8[136 * i : 136 * i + 136]
        d = half_to_float(block[0], block[1])
        for j in range(8):
            lower = np.int32(block[4 + (j >> 1)]) >> np.int32(4 * (j & 1)) & 15
            upper = np.int32(block[2 + (j >> 2)]) >> np.int32(2 * (j & 3)) & 3
            step = np.float32(d * np.float32(np.int32(np.int32(lower | upper << 4) - 32)))
            first = 256 * i + 32 * j
            _decode_run(block[8 + 16 * j : 24 + 16 * j], step, out_f32[first : first + 32])


@njit(cache=True, nogil=True, error_model="numpy")
def _nearest(v):
    # best_index_int8's level: halfway between two the upper one, and the highest for NaN. Fifteen
    # comparisons and no table, as LLVM then vectorises the loops around this.
    q = np.float32(113)
    q = np.float32(89) if v < np.float32(101) else q
    q = np.float32(69) if v < np.float32(79) else q
    q = np.float32(53) if v < np.float32(61) else q
    q = np.float32(38) if v < np.float32(45.5) else q
    q = np.float32(25) if v < np.float32(31.5) else q
    q = np.float32(13) if v < np.float32(19) else q
    q = np.float32(1) if v < np.float32(7) else q
    q = np.float32(-10) if v < np.float32(-4.5) else q
    q = np.float32(-22) if v < np.float32(-16) else q
    q = np.float32(-35) if v < np.float32(-28.5) else q
    q = np.float32(-49) if v < np.float32(-42) else q
    q = np.float32(-65) if v < np.float32(-57) else q
    q = np.float32(-83) if v < np.float32(-74) else q
    q = np.float32(-104) if v < np.float32(-93.5) else q
    return np.float32(-127) if v < np.float32(-115.5) else q


@njit(cache=True, nogil=True, error_model="numpy")
def _index(v):
    # The number of that level.
    below = np.int32(v < np.float32(-115.5)) + np.int32(v < np.float32(-93.5))
    below += np.int32(v < np.float32(-74)) + np.int32(v < np.float32(-57))
    below += np.int32(v < np.float32(-42)) + np.int32(v < np.float32(-28.5))
    below += np.int32(v < np.float32(-16)) + np.int32(v < np.float32(-4.5))
    below += np.int32(v < np.float32(7)) + np.int32(v < np.float32(19))
    below += np.int32(v < np.float32(31.5)) + np.int32(v < np.float32(45.5))
    below += np.int32(v < np.float32(61)) + np.int32(v < np.float32(79))
    return np.int32(15 - (below + np.int32(v < np.float32(101))))


@njit(cache=True, nogil=True, error_model="numpy")
def _gather(x_f32, first, tile, weights):
    # Sub-block `first` becomes lane 0. What stands in unused lanes is never written out.
    put_beside(x_f32, first, min(LANES, x_f32.size // 32 - first), 32, tile, LANES)
    for i in range(32 * LANES):
        weights[i] = np.float32(tile[i] * tile[i])


@njit(cache=True, nogil=True, error_model="numpy")
def _find_extremes(tile, state):
    for lane in range(LANES):
        state[EXTREME + lane] = np.float32(0.0)
    for k in range(32):
        for lane in range(LANES):
            x = tile[k * LANES + lane]
            extreme = state[EXTREME + lane]
            state[EXTREME + lane] = x if abs(x) > abs(extreme) else extreme


@njit(cache=True, nogil=True, error_model="numpy")
def _project(tile, weights, state):
    # Levels of a candidate, and their weighted sums.
    for lane in range(LANES):
        state[SUM_XQ + lane] = np.float32(0.0)
        state[SUM_Q2 + lane] = np.float32(0.0)
    for k in range(32):
        for lane in range(LANES):
            x = tile[k * LANES + lane]
            q = _nearest(np.float32(state[INVERSE + lane] * x))
            wq = np.float32(weights[k * LANES + lane] * q)
            state[SUM_XQ + lane] += np.float32(wq * x)
            state[SUM_Q2 + lane] += np.float32(wq * q)


@njit(cache=True, nogil=True, error_model="numpy")
def _judge(state, first):
    # The better of a candidate and the best so far stays.
    for lane in range(LANES):
        sum_xq = state[SUM_XQ + lane]
        sum_q2 = state[SUM_Q2 + lane]
        quality = state[QUALITY + lane]
        better = sum_q2 > 0 and np.float32(sum_xq * sum_xq) > np.float32(quality * sum_q2)
        better = better or first
        scale = np.float32(sum_xq / sum_q2) if sum_q2 > 0 else np.float32(0.0)
        state[QUALITY + lane] = np.float32(scale * sum_xq) if better else quality
        state[SCALE + lane] = scale if better else state[SCALE + lane]


@njit(cache=True, nogil=True, error_model="numpy")
def search_iq4(tile, weights, state):
    """Find the scales of sub-blocks that have the least weighted squared errors.

    Parameters
    ----------
    tile, weights : (32 * 64,) float32
        32 rows of values and of their weights, a sub-block to a lane
    state : (6 * 64,) float32
        written; the second row holds the scales
    """
    _find_extremes(tile, state)
    for lane in range(LANES):
        scale = np.float32(-state[EXTREME + lane] / np.float32(-127.0))
        state[INVERSE + lane] = np.float32(np.float32(1.0) / scale)
    _project(tile, weights, state)
    _judge(state, True)
    for step in range(-REACH, REACH + 1):
        dividend = np.float32(np.int32(step) - np.int32(127))
        for lane in range(LANES):
            state[INVERSE + lane] = np.float32(dividend / state[EXTREME + lane])
        _project(tile, weights, state)
        _judge(state, False)
    for lane in range(LANES):
        zero = abs(state[EXTREME + lane]) < EPSILON
        state[SCALE + lane] = np.float32(0.0) if zero else state[SCALE + lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _write_run(x, scale, quants):
    # 32 values -> 16 bytes
    inverse = np.float32(np.float32(1.0) / scale) if scale != 0 else np.float32(0.0)
    for j in range(quants.size):
        low = _index(np.float32(inverse * x[j]))
        quants[j] = np.uint8(low | _index(np.float32(inverse * x[16 + j])) << 4)


@njit(cache=True, nogil=True, error_model="numpy")
def write_iq4_nl(x_f32, scales_f32, out_u8):
    """Write IQ4_NL blocks for the scales that a search found.

    Parameters
    ----------
    x_f32 : (n_blocks * 32,) float32
        finite values
    scales_f32 : (n_blocks,) float32
        from `search_iq4`
    out_u8 : (n_blocks * 18,) uint8
        written
    """
    for i in range(out_u8.size // 18):
        block = out_u8[18 * i : 18 * i + 18]
        # Squares of huge values overflow, and what comes of that is a negative NaN on x86 only
        half = np.uint32(0xFE00) if np.isnan(scales_f32[i]) else float_to_half(scales_f32[i])
        block[0] = half & 255
        block[1] = half >> 8
        _write_run(x_f32[32 * i : 32 * i + 32], scales_f32[i], block[2:18])


@njit(cache=True, nogil=True, error_model="numpy")
def encode_iq4_nl(x_f32, scratch_f32, out_u8):
    """Write the blocks that ggml makes without an importance matrix (quantize_iq4_nl).

    Parameters
    ----------
    x_f32 : (n_blocks * 32,) float32
        finite values
    scratch_f32 : (>= SCRATCH_LEN,) float32
        overwritten
    out_u8 : (n_blocks * 18,) uint8
        written
    """
    tile = scratch_f32[: 32 * LANES]
    weights = scratch_f32[32 * LANES : 64 * LANES]
    state = scratch_f32[64 * LANES : SCRATCH_LEN]
    n_blocks = x_f32.size // 32
    for first in range(0, n_blocks, LANES):
        last = min(first + LANES, n_blocks)
        _gather(x_f32, first, tile, weights)
        search_iq4(tile, weights, state)
        scales = state[SCALE : SCALE + last - first]
        write_iq4_nl(x_f32[32 * first : 32 * last], scales, out_u8[18 * first : 18 * last])


@njit(cache=True, nogil=True, error_model="numpy")
def _write_super_block(x, scales, block):
    largest = np.float32(0.0)
    extreme = np.float32(0.0)
    for j in range(scales.size):
        extreme = scales[j] if abs(scales[j]) > largest else extreme
        largest = abs(scales[j]) if abs(scales[j]) > largest else largest
    d = np.float32(-extreme / np.float32(32.0))
    inverse = np.float32(np.float32(1.0) / d) if d != 0 else np.float32(0.0)
    half = float_to_half(d)
    block[0] = half & 255
    block[1] = half >> 8
    block[2:8] = 0
    for j in range(scales.size):
        scale_q = nearest_int(np.float32(inverse * scales[j]))
        scale_q = np.int32(min(max(scale_q, np.int32(-32)), np.int32(31)))
        step = np.float32(d * np.float32(scale_q))  # with d as it was before binary16
        _write_run(x[32 * j : 32 * j + 32], step, block[8 + 16 * j : 24 + 16 * j])
        code = np.int32(scale_q + 32)
        block[4 + (j >> 1)] |= np.uint8((code & 15) << np.int32(4 * (j & 1)))
        block[2 + (j >> 2)] |= np.uint8(code >> 4 << np.int32(2 * (j & 3)))


@njit(cache=True, nogil=True, error_model="numpy")
def write_iq4_xs(x_f32, scales_f32, out_u8):
    """Write IQ4_XS blocks for the scales that a search found.

    Parameters
    ----------
    x_f32 : (n_blocks * 256,) float32
        finite values
    scales_f32 : (n_blocks * 8,) float32
        from `search_iq4`
    out_u8 : (n_blocks * 136,) uint8
        written
    """
    for i in range(out_u8.size // 136):
        block = out_u8[136 * i : 136 * i + 136]
        _write_super_block(x_f32[256 * i : 256 * i + 256], scales_f32[8 * i : 8 * i + 8], block)


@njit(cache=True, nogil=True, error_model="numpy")
def encode_iq4_xs(x_f32, scratch_f32, out_u8):
    """Write the blocks that ggml makes without an importance matrix (quantize_iq4_xs).

    Parameters
    ----------
    x_f32 : (n_blocks * 256,) float32
        finite values
    scratch_f32 : (>= SCRATCH_LEN,) float32
        overwritten
    out_u8 : (n_blocks * 136,) uint8
        written
    """
    tile = scratch_f32[: 32 * LANES]
    weights = scratch_f32[32 * LANES : 64 * LANES]
    state = scratch_f32[64 * LANES : SCRATCH_LEN]
    n_sub = x_f32.size // 32
    for first in range(0, n_sub, LANES):
        last = min(first + LANES, n_sub)
        _gather(x_f32, first, tile, weights)
        search_iq4(tile, weights, state)
        scales = state[SCALE : SCALE + last - first]
        write_iq4_xs(x_f32[32 * first : 32 * last], scales, out_u8[17 * first : 17 * last])
