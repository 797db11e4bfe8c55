"""Q3_K: super-blocks of 256 values, sixteen sub-blocks of 16, each with its own scale.

value = d * (scale - 32) * (q - 4), with q of 3 bits and scale of 6 bits. Block of 110 bytes
(ggml-common.h, block_q3_K): 32 bytes with the quants' upper bits, byte k bit r of quant 32 r + k; 64
bytes with the lower two, each half of the block in 32 bytes, run r of 32 in bits 2 r and 2 r + 1; 12
bytes of scales; d as binary16. Of scale j the lower four bits stand in byte j mod 8, below for the
first eight scales and above for the others, the upper two in bits 2 (j / 4) of byte 8 + j mod 4.

The encoder is ggml's quantize_row_q3_K_ref, bit for bit, turned on its side as q6_k.py explains: 64
sub-blocks stand beside each other, tile[element, lane], and every loop runs over lanes. Its search
moves one quant after the other, as long as moving one helps a lane; lanes that have come to rest
stay as they are in further rounds. 4 times ggml's speed with AVX-512, 2.8 with AVX2.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.lanes import put_beside
from edgemerge.kernels.llvm import fill_sixteen
from edgemerge.kernels.scalars import float_to_half, half_to_float, nearest_int

LANES = 64
ROUNDS = 5  # how often the search passes over the elements
EPSILON = np.float32(1e-15)  # ggml's GROUP_MAX_EPS: what is smaller counts as zero

# Rows of LANES float32 in the scratch, after the 16 rows of the tile, the 16 of its quants and 256
# quants of one block.
INVERSE = 0 * LANES  # 1 / scale of the first fit
SUM_XL = 1 * LANES  # of the quants, l in ggml's code; weighted by x squared
SUM_L2 = 2 * LANES
SCALE = 3 * LANES
MOVED = 4 * LANES  # 1 where a quant moved in this round
SCRATCH_LEN = 32 * LANES + 256 + 5 * LANES


@njit(cache=True, nogil=True, error_model="numpy")
def _scale(packed, j):
    lower = np.int32(packed[j & 7]) >> np.int32(4 * (j >> 3)) & 15
    upper = np.int32(packed[8 + (j & 3)]) >> np.int32(2 * (j >> 2)) & 3
    return np.float32(np.int32(np.int32(lower | upper << 4) - 32))


@njit(cache=True, nogil=True, error_model="numpy")
def decode_q3_k(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_q3_K).

    Parameters
    ----------
    raw_u8 : (n_blocks * 110,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 256,) float32
        written
    """
    for i in range(raw_u8.size // 110):
        block = raw_u8[110 * i : 110 * i + 110]
        d = half_to_float(block[108], block[109])
        for j in range(4):
            # Four sub-blocks that share their bytes, every other one
            first = 8 * (j >> 1) + (j & 1)
            d0 = np.float32(d * _scale(block[96:108], first))
            d1 = np.float32(d * _scale(block[96:108], first + 2))
            d2 = np.float32(d * _scale(block[96:108], first + 4))
            d3 = np.float32(d * _scale(block[96:108], first + 6))
            lower = block[32 + 16 * j : 48 + 16 * j]
            upper = block[16 * (j & 1) : 16 * (j & 1) + 16]
            y = out_f32[256 * i + 16 * first : 256 * i + 16 * first + 112]
            for k in range(16):
                a, b = np.int32(lower[k]), np.int32(np.int32(upper[k]) >> np.int32(4 * (j >> 1)))
                y[k] = d0 * np.float32(np.int32(np.int32(a & 3 | (b & 1) << 2) - 4))
                y[32 + k] = d1 * np.float32(np.int32(np.int32(a >> 2 & 3 | (b & 2) << 1) - 4))
                y[64 + k] = d2 * np.float32(np.int32(np.int32(a >> 4 & 3 | b & 4) - 4))
                y[96 + k] = d3 * np.float32(np.int32(np.int32(a >> 6 | b >> 1 & 4) - 4))


@njit(cache=True, nogil=True, error_model="numpy")
def _level(v):
    return np.float32(min(max(nearest_int(v), np.int32(-4)), np.int32(3)))


@njit(cache=True, nogil=True, error_model="numpy")
def _fit_extreme(tile, quants, state):
    # First fit: the value of largest magnitude gets quant -4.
    for lane in range(LANES):
        largest = np.float32(0.0)
        extreme = np.float32(0.0)
        for k in range(16):
            x = tile[k * LANES + lane]
            extreme = x if abs(x) > largest else extreme
            largest = abs(x) if abs(x) > largest else largest
        state[INVERSE + lane] = np.float32(np.float32(-4.0) / extreme)
        state[SCALE + lane] = largest  # for _finish, which asks whether the lane is zero
        state[SUM_XL + lane] = np.float32(0.0)
        state[SUM_L2 + lane] = np.float32(0.0)
    for k in range(16):
        for lane in range(LANES):
            x = tile[k * LANES + lane]
            level = _level(np.float32(state[INVERSE + lane] * x))
            quants[k * LANES + lane] = level
            w = np.float32(x * x)
            state[SUM_XL + lane] += np.float32(np.float32(w * x) * level)
            state[SUM_L2 + lane] += np.float32(np.float32(w * level) * level)


@njit(cache=True, nogil=True, error_model="numpy")
def _move_quants(tile, quants, state):
    # One round: each element's quant moves where the others want it, if that helps. Says whether
    # any did.
    for lane in range(LANES):
        state[MOVED + lane] = np.float32(0.0)
    for k in range(16):
        for lane in range(LANES):
            x = tile[k * LANES + lane]
            level = quants[k * LANES + lane]
            sum_xl = state[SUM_XL + lane]
            sum_l2 = state[SUM_L2 + lane]
            w = np.float32(x * x)
            wx = np.float32(w * x)
            other_xl = np.float32(sum_xl - np.float32(wx * level))
            other_l2 = np.float32(sum_l2 - np.float32(np.float32(w * level) * level))
            wanted = _level(np.float32(np.float32(x * other_l2) / other_xl))
            new_xl = np.float32(other_xl + np.float32(wx * wanted))
            new_l2 = np.float32(other_l2 + np.float32(np.float32(w * wanted) * wanted))
            gain = np.float32(np.float32(new_xl * new_xl) * sum_l2)
            helps = gain > np.float32(np.float32(sum_xl * sum_xl) * new_l2)
            helps = (other_xl > 0) & (wanted != level) & (new_l2 > 0) & helps
            quants[k * LANES + lane] = wanted if helps else level
            state[SUM_XL + lane] = new_xl if helps else sum_xl
            state[SUM_L2 + lane] = new_l2 if helps else sum_l2
            # A row, as LLVM vectorises no loop that also reduces to one number
            state[MOVED + lane] = np.float32(1.0) if helps else state[MOVED + lane]
    moved = np.float32(0.0)
    for lane in range(LANES):
        moved = max(moved, state[MOVED + lane])
    return moved > 0


@njit(cache=True, nogil=True, error_model="numpy")
def _finish(quants, state):
    # Scale for the quants as they are; a lane of zeros has scale 0 and quants 0 - 4.
    for lane in range(LANES):
        sum_xl = state[SUM_XL + lane]
        sum_l2 = state[SUM_L2 + lane]
        scale = np.float32(sum_xl / sum_l2) if sum_l2 > 0 else np.float32(0.0)
        zero = state[SCALE + lane] < EPSILON
        state[SCALE + lane] = np.float32(0.0) if zero else scale
        for k in range(16):
            level = quants[k * LANES + lane]
            quants[k * LANES + lane] = np.float32(-4.0) if zero else level


@njit(cache=True, nogil=True, error_model="numpy")
def _write_header(state, first_lane, block):
    # d and the sixteen 6-bit scales.
    largest = np.float32(0.0)
    extreme = np.float32(0.0)
    for lane in range(first_lane, first_lane + 16):
        scale = state[SCALE + lane]
        extreme = scale if abs(scale) > largest else extreme
        largest = abs(scale) if abs(scale) > largest else largest
    block[96:110] = 0
    if extreme == 0:
        return
    inverse = np.float32(np.float32(-32.0) / extreme)
    half = float_to_half(np.float32(np.float32(1.0) / inverse))
    block[108] = half & 255
    block[109] = half >> 8
    packed = block[96:108]
    for j in range(16):
        # ggml rounds into an int8 before it clamps
        scale_q = np.int32(
            np.int8(nearest_int(np.float32(inverse * state[SCALE + first_lane + j])))
        )
        scale_q = np.int32(min(max(scale_q, np.int32(-32)), np.int32(31)) + 32)
        packed[j & 7] |= np.uint8((scale_q & 15) << np.int32(4 * (j >> 3)))
        packed[8 + (j & 3)] |= np.uint8(scale_q >> 4 << np.int32(2 * (j >> 2)))


@njit(cache=True, nogil=True, error_model="numpy")
def _write_quants(x, quants, first_lane, levels, block):
    # Quants for the scales as they were rounded.
    d = half_to_float(block[108], block[109])
    n_zero = np.int32(0)
    for j in range(16):
        step = np.float32(d * _scale(block[96:108], j))
        n_zero += np.int32(step == 0)
        fill_sixteen(levels, 16 * j, step)
    for k in range(256):
        levels[k] = _bits_of_quant(np.float32(x[k] / levels[k]))
    if n_zero > 0:  # ggml leaves the quants of the search in place
        for j in range(16):
            if np.float32(d * _scale(block[96:108], j)) == 0:
                for k in range(16):
                    level = quants[k * LANES + first_lane + j]
                    levels[16 * j + k] = _bits_of_quant(level)
    _pack(levels.view(np.int32), block)


@njit(cache=True, nogil=True, error_model="numpy")
def _bits_of_quant(v):
    # The quant as an int32 in the place of a float32, so that a loop reads and writes one array.
    return np.int32(np.int32(_level(v)) + np.int32(4)).view(np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def _pack(quants, block):
    two, three = np.int32(2), np.int32(3)
    for k in range(np.uint64(32)):
        upper = np.int32(0)
        for j in range(8):
            upper |= quants[32 * j + k] >> two << np.int32(j)
        block[k] = np.uint8(upper)
    for j in range(2):
        runs = quants[128 * j : 128 * j + 128]
        lower = block[32 + 32 * j : 64 + 32 * j]
        for k in range(np.uint64(32)):
            low = runs[k] & three | (runs[np.uint64(32) + k] & three) << two
            high = runs[np.uint64(64) + k] & three | (runs[np.uint64(96) + k] & three) << two
            lower[k] = np.uint8(low | high << np.int32(4))


@njit(cache=True, nogil=True, error_model="numpy")
def write_quants_q3_k(x_f32, quants, levels_f32, out_u8):
    """Write the quants of blocks whose scales are written already.

    Parameters
    ----------
    x_f32 : (n_blocks * 256,) float32
        finite values
    quants : (16 * 64,) float32
        16 rows of a lane for each sub-block: quants of those whose scale is zero
    levels_f32 : (>= 256,) float32
        overwritten
    out_u8 : (n_blocks * 110,) uint8
        the quants are written
    """
    for i in range(out_u8.size // 110):
        block = out_u8[110 * i : 110 * i + 110]
        _write_quants(x_f32[256 * i : 256 * i + 256], quants, 16 * i, levels_f32, block)


@njit(cache=True, nogil=True, error_model="numpy")
def encode_q3_k(x_f32, scratch_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_q3_K_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 256,) float32
        finite values
    scratch_f32 : (>= SCRATCH_LEN,) float32
        overwritten
    out_u8 : (n_blocks * 110,) uint8
        written
    """
    tile = scratch_f32[: 16 * LANES]
    quants = scratch_f32[16 * LANES : 32 * LANES]
    levels = scratch_f32[32 * LANES : 32 * LANES + 256]
    state = scratch_f32[32 * LANES + 256 : SCRATCH_LEN]
    n_sub = x_f32.size // 16
    for first in range(0, n_sub, LANES):
        n_lanes = min(LANES, n_sub - first)
        put_beside(x_f32, first, n_lanes, 16, tile, LANES)
        _fit_extreme(tile, quants, state)
        for _ in range(ROUNDS):
            if not _move_quants(tile, quants, state):
                break
        _finish(quants, state)
        for lane in range(0, n_lanes, 16):
            i = (first + lane) // 16
            x = x_f32[256 * i : 256 * i + 256]
            block = out_u8[110 * i : 110 * i + 110]
            _write_header(state, lane, block)
            _write_quants(x, quants, lane, levels, block)
