"""Q6_K: super-blocks of 256 values, sixteen sub-blocks of 16, each with its own scale.

value = d * scale * (q - 32), with q of 6 bits and scale an int8. Block of 210 bytes (ggml-common.h,
block_q6_K): 128 bytes with the lower four bits of the quants, 64 with the upper two, 16 scales, d
as binary16. Each half of the block holds four runs of 32 quants: in its 64 lower bytes, runs 0 and
1 below and runs 2 and 3 above; in its 32 upper bytes, run r in bits 2 r and 2 r + 1.

The encoder is ggml's quantize_row_q6_K_ref, bit for bit, turned on its side: 128 sub-blocks stand
beside each other, tile[element, lane], and every loop runs over lanes. Each lane adds in the order
of ggml's scalar code, so the sums are the same, and the compiler can use SIMD without reordering a
sum: 9 times ggml's speed with AVX-512, 6 with AVX2. A last tile is computed whole; what stands in
its unused lanes is never written out.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.lanes import put_beside
from edgemerge.kernels.llvm import fill_sixteen, is_arm64
from edgemerge.kernels.scalars import float_to_half, half_to_float, nearest_int

LANES = 128
STEPS = 19  # candidate scales of the search
SHIFT = np.float32(12582912.0)  # 1.5 * 2^23: floats from 2^22 below it on are integers
EPSILON = np.float32(1e-15)  # ggml's GROUP_MAX_EPS: what is smaller counts as zero

# Rows of LANES float32 in the scratch, after 16 of the tile, 16 of its squares, 16 of its cubes and 256
# quants of one block.
EXTREME = 0 * LANES  # value of largest magnitude, with its sign
SCALE = 1 * LANES  # scale of the best fit so far
QUALITY = 2 * LANES  # its scale times its sum of x l; a better fit has more
FIT_INVERSE = 3 * LANES  # quants of the best fit: round(FIT_INVERSE * x)
INVERSE = 4 * LANES  # 1 / scale of the candidate
SUM_XL = 5 * LANES  # of its quants, l in ggml's code; weighted by x squared
SUM_L2 = 6 * LANES
LOWEST = 7 * LANES  # quant
SCRATCH_LEN = (16 + 16 + 16 + 8) * LANES + 256


@njit(cache=True, nogil=True, error_model="numpy")
def _level(v):
    return np.float32(min(max(nearest_int(v), np.int32(-32)), np.int32(31)))


@njit(cache=True, nogil=True, error_model="numpy")
def _search_level(v, lowest):
    # The same for |v| < 2^22, without leaving the registers of vectors.
    if is_arm64():  # LLVM makes one instruction of a minimum of integers on NEON, but not of floats
        bits = np.int32(np.float32(v + SHIFT).view(np.int32))
        bits = np.int32(max(bits, np.int32(np.float32(SHIFT - np.float32(32.0)).view(np.int32))))
        bits = np.int32(min(bits, np.int32(np.float32(SHIFT + np.float32(31.0)).view(np.int32))))
        return np.float32(bits.view(np.float32) - SHIFT)
    # Were both bounds constants, LLVM would make four instructions of the two that clamp.
    level = np.float32(np.rint(v))
    level = level if level > lowest else lowest
    return level if level < np.float32(31.0) else np.float32(31.0)


@njit(cache=True, nogil=True, error_model="numpy")
def decode_q6_k(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_q6_K).

    Parameters
    ----------
    raw_u8 : (n_blocks * 210,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 256,) float32
        written
    """
    for i in range(raw_u8.size // 210):
        block = raw_u8[210 * i : 210 * i + 210]
        d = half_to_float(block[208], block[209])
        for j in range(4):
            # Runs 0 to 3 of half a block, the first or the last 16 values of each
            first = 64 * (j >> 1) + 16 * (j & 1)
            lower = block[first : first + 48]
            first = 128 + 32 * (j >> 1) + 16 * (j & 1)
            upper = block[first : first + 16]
            first = 192 + 8 * (j >> 1) + (j & 1)
            d0 = np.float32(d * np.float32(np.int8(block[first])))
            d1 = np.float32(d * np.float32(np.int8(block[first + 2])))
            d2 = np.float32(d * np.float32(np.int8(block[first + 4])))
            d3 = np.float32(d * np.float32(np.int8(block[first + 6])))
            first = 256 * i + 128 * (j >> 1) + 16 * (j & 1)
            y = out_f32[first : first + 112]
            for k in range(16):
                a, b, c = np.int32(lower[k]), np.int32(lower[32 + k]), np.int32(upper[k])
                y[k] = d0 * np.float32(np.int32(np.int32(a & 15 | (c & 3) << 4) - 32))
                y[32 + k] = d1 * np.float32(np.int32(np.int32(b & 15 | (c & 12) << 2) - 32))
                y[64 + k] = d2 * np.float32(np.int32(np.int32(a >> 4 | c & 48) - 32))
                y[96 + k] = d3 * np.float32(np.int32(np.int32(b >> 4 | c >> 2 & 48) - 32))


@njit(cache=True, nogil=True, error_model="numpy")
def _measure(tile, squares, cubes, state):
    # Weights and weighted values, and the extreme of each lane.
    for lane in range(LANES):
        largest = np.float32(0.0)
        extreme = np.float32(0.0)
        for k in range(16):
            x = tile[k * LANES + lane]
            square = np.float32(x * x)
            squares[k * LANES + lane] = square
            cubes[k * LANES + lane] = np.float32(square * x)
            extreme = x if abs(x) > largest else extreme
            largest = abs(x) if abs(x) > largest else largest
        state[EXTREME + lane] = extreme
        state[LOWEST + lane] = np.float32(-32.0)


@njit(cache=True, nogil=True, error_model="numpy")
def _project(tile, squares, cubes, state, dividend):
    # Quants of a candidate, and their weighted sums. Only in a lane that counts as zero is a |v| above 33.
    for lane in range(LANES):
        state[INVERSE + lane] = np.float32(dividend / state[EXTREME + lane])
        state[SUM_XL + lane] = np.float32(0.0)
        state[SUM_L2 + lane] = np.float32(0.0)
    # Eight elements a turn: sums stay in registers for so long, and LLVM unrolls the inner loop.
    for i in range(0, 16, 8):
        for lane in range(LANES):
            sum_xl = state[SUM_XL + lane]
            sum_l2 = state[SUM_L2 + lane]
            for k in range(8):
                x = tile[(i + k) * LANES + lane]
                v = np.float32(state[INVERSE + lane] * x)
                level = _search_level(v, state[LOWEST + lane])
                sum_xl = np.float32(sum_xl + np.float32(cubes[(i + k) * LANES + lane] * level))
                weighted = np.float32(squares[(i + k) * LANES + lane] * level)
                sum_l2 = np.float32(sum_l2 + np.float32(weighted * level))
            state[SUM_XL + lane] = sum_xl
            state[SUM_L2 + lane] = sum_l2


@njit(cache=True, nogil=True, error_model="numpy")
def _judge(state, first):
    # The better of a candidate and the best so far stays.
    for lane in range(LANES):
        sum_xl = state[SUM_XL + lane]
        sum_l2 = state[SUM_L2 + lane]
        quality = state[QUALITY + lane]
        better = sum_l2 > 0 and np.float32(sum_xl * sum_xl) > np.float32(quality * sum_l2)
        better = better or first
        scale = np.float32(sum_xl / sum_l2) if sum_l2 != 0 else np.float32(0.0)
        inverse = state[INVERSE + lane]
        state[QUALITY + lane] = np.float32(scale * sum_xl) if better else quality
        state[SCALE + lane] = scale if better else state[SCALE + lane]
        state[FIT_INVERSE + lane] = inverse if better else state[FIT_INVERSE + lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _search(tile, squares, cubes, state):
    _measure(tile, squares, cubes, state)
    for step in range(STEPS):
        tenths = 0 if step == 0 else step - 10 if step < 10 else step - 9  # 0, -9 ... -1, 1 ... 9
        dividend = np.float32(np.float32(0.1) * np.float32(tenths))
        dividend = np.float32(-np.float32(np.float32(32.0) + dividend))
        _project(tile, squares, cubes, state, dividend)
        _judge(state, step == 0)
    for lane in range(LANES):
        zero = abs(state[EXTREME + lane]) < EPSILON
        state[SCALE + lane] = np.float32(0.0) if zero else state[SCALE + lane]


@njit(cache=True, nogil=True, error_model="numpy")
def _write_head(scales, block):
    # The sixteen scales and d.
    largest = np.float32(0.0)
    extreme = np.float32(0.0)
    for j in range(16):
        scale = scales[j]
        extreme = scale if abs(scale) > largest else extreme
        largest = abs(scale) if abs(scale) > largest else largest
    if largest < EPSILON:
        block[192:210] = 0
        return
    inverse = np.float32(np.float32(-128.0) / extreme)
    half = float_to_half(np.float32(np.float32(1.0) / inverse))
    block[208] = half & 255
    block[209] = half >> 8
    for j in range(16):
        scale_q = min(nearest_int(np.float32(inverse * scales[j])), np.int32(127))
        block[192 + j] = np.uint8(scale_q & 255)


@njit(cache=True, nogil=True, error_model="numpy")
def _write_quants(x, scales, extremes, inverses, levels, block):
    # Quants for the scales as they were rounded.
    d = half_to_float(block[208], block[209])
    n_zero = np.int32(0)
    for j in range(16):
        scale = np.int32(np.int8(block[192 + j]))
        n_zero += np.int32(scale == 0)
        fill_sixteen(levels, 16 * j, np.float32(d * np.float32(scale)))
    for k in range(256):
        levels[k] = _bits_of_quant(np.float32(x[k] / levels[k]))
    if n_zero > 0 or d == 0:
        _keep_quants(x, scales, extremes, inverses, d, levels, block)
    _pack(levels.view(np.int32), block)


@njit(cache=True, nogil=True, error_model="numpy")
def _bits_of_quant(v):
    # The quant as an int32 in the place of a float32, so that a loop reads and writes one array.
    level = min(max(nearest_int(v), np.int32(-32)), np.int32(31))
    return np.int32(level + np.int32(32)).view(np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def _keep_quants(x, scales, extremes, inverses, d, levels, block):
    # Where a scale was rounded to zero ggml leaves the quants of the search in place.
    largest = np.float32(0.0)
    for j in range(16):
        largest = abs(scales[j]) if abs(scales[j]) > largest else largest
    for j in range(16):
        if np.float32(d * np.float32(np.int32(np.int8(block[192 + j])))) == 0:
            zero = largest < EPSILON or abs(extremes[j]) < EPSILON
            for k in range(16 * j, 16 * j + 16):
                quant = _bits_of_quant(np.float32(inverses[j] * x[k]))
                levels[k] = np.float32(0.0) if zero else quant


@njit(cache=True, nogil=True, error_model="numpy")
def _pack(quants, block):
    four, fifteen = np.int32(4), np.int32(15)
    for i in range(2):
        runs = quants[128 * i : 128 * i + 128]
        lower = block[64 * i : 64 * i + 64]
        upper = block[128 + 32 * i : 160 + 32 * i]
        for k in range(np.uint64(32)):
            q0, q1 = runs[k], runs[np.uint64(32) + k]
            q2, q3 = runs[np.uint64(64) + k], runs[np.uint64(96) + k]
            lower[k] = np.uint8(q0 & fifteen | q2 << four)
            lower[np.uint64(32) + k] = np.uint8(q1 & fifteen | q3 << four)
            low, high = (
                q0 >> four | q1 >> four << np.int32(2),
                q2 >> four | q3 >> four << np.int32(2),
            )
            upper[k] = np.uint8(low | high << four)


@njit(cache=True, nogil=True, error_model="numpy")
def write_q6_k(x_f32, scales_f32, extremes_f32, inverses_f32, levels_f32, out_u8):
    """Write blocks for the scales that a search found.

    Parameters
    ----------
    x_f32 : (n_blocks * 256,) float32
        finite values
    scales_f32, extremes_f32, inverses_f32 : (n_blocks * 16,) float32
        of each sub-block: its scale, its value of largest magnitude, and where the scale is rounded
        to zero what gives its quants, which are round(inverse * x)
    levels_f32 : (>= 256,) float32
        overwritten
    out_u8 : (n_blocks * 210,) uint8
        written
    """
    _write_blocks(x_f32, scales_f32, extremes_f32, inverses_f32, levels_f32[:256], out_u8)


@njit(cache=True, nogil=True, error_model="numpy")
def _write_blocks(x, scales, extremes, inverses, levels, out):
    # Heads first: each has a chain of steps, and those of several blocks overlap.
    for i in range(out.size // 210):
        _write_head(scales[16 * i : 16 * i + 16], out[210 * i : 210 * i + 210])
    for i in range(out.size // 210):
        _write_quants(
            x[256 * i : 256 * i + 256],
            scales[16 * i : 16 * i + 16],
            extremes[16 * i : 16 * i + 16],
            inverses[16 * i : 16 * i + 16],
            levels,
            out[210 * i : 210 * i + 210],
        )


@njit(cache=True, nogil=True, error_model="numpy")
def encode_q6_k(x_f32, scratch_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_q6_K_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 256,) float32
        finite values
    scratch_f32 : (>= SCRATCH_LEN,) float32
        overwritten
    out_u8 : (n_blocks * 210,) uint8
        written
    """
    tile = scratch_f32[: 16 * LANES]
    squares = scratch_f32[16 * LANES : 32 * LANES]
    cubes = scratch_f32[32 * LANES : 48 * LANES]
    state = scratch_f32[48 * LANES : 56 * LANES]
    levels = scratch_f32[56 * LANES : SCRATCH_LEN]
    n_sub = x_f32.size // 16
    for first in range(0, n_sub, LANES):
        n_lanes = min(LANES, n_sub - first)
        put_beside(x_f32, first, n_lanes, 16, tile, LANES)
        _search(tile, squares, cubes, state)
        x = x_f32[16 * first : 16 * (first + n_lanes)]
        scales = state[SCALE : SCALE + n_lanes]
        extremes = state[EXTREME : EXTREME + n_lanes]
        inverses = state[FIT_INVERSE : FIT_INVERSE + n_lanes]
        n_bytes = 210 * (n_lanes // 16)
        out = out_u8[210 * (first // 16) : 210 * (first // 16) + n_bytes]
        _write_blocks(x, scales, extremes, inverses, levels, out)
