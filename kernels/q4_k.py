"""Q4_K: super-blocks of 256 values, eight sub-blocks of 32, each with its own scale and minimum.

value = d * scale * q - dmin * minimum, with q of 4 bits, scale and minimum of 6 bits. Block of
144 bytes (ggml-common.h, block_q4_K): d and dmin as binary16; 12 bytes of scales and minima; 128
bytes, where byte 32 p + j holds quant j of sub-block 2 p below and of sub-block 2 p + 1 above.

The encoder is ggml's quantize_row_q4_K_ref, bit for bit, as affine_search.py explains.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.affine_search import (
    FIT_INVERSE,
    FIT_MIN,
    LANES,
    SCRATCH_LEN,
    STATE,
    find_levels,
    search_tile,
    write_head,
)
from edgemerge.kernels.scalars import all_scales_and_minima, times_byte

TOP = np.float32(15)  # largest quant
STEPS = 21  # candidate scales of the search
FIRST = np.float32(-1.0)  # what the first candidate adds to TOP; each further one adds 0.1


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
        d, dmin, scales, minima, more_scales, more_minima = all_scales_and_minima(block)
        for half in range(2):  # four sub-blocks at once, whose eight numbers stay in registers
            if half == 1:
                scales, minima = more_scales, more_minima
            step0, offset0 = times_byte(d, scales, 0), times_byte(dmin, minima, 0)
            step1, offset1 = times_byte(d, scales, 1), times_byte(dmin, minima, 1)
            step2, offset2 = times_byte(d, scales, 2), times_byte(dmin, minima, 2)
            step3, offset3 = times_byte(d, scales, 3), times_byte(dmin, minima, 3)
            quants = block[16 + 64 * half : 80 + 64 * half]
            y = out_f32[256 * i + 128 * half : 256 * i + 128 * half + 128]
            for k in range(32):
                y[k] = step0 * np.float32(np.int32(quants[k] & 15)) - offset0
                y[32 + k] = step1 * np.float32(np.int32(quants[k] >> 4)) - offset1
                y[64 + k] = step2 * np.float32(np.int32(quants[32 + k] & 15)) - offset2
                y[96 + k] = step3 * np.float32(np.int32(quants[32 + k] >> 4)) - offset3


@njit(cache=True, nogil=True, error_model="numpy")
def _write_quants(x, inverses, minima, levels, block):
    find_levels(x, inverses, minima, TOP, levels, block)
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
    state = scratch_f32[STATE:SCRATCH_LEN]
    n_sub = x_f32.size // 32
    for first in range(0, n_sub, LANES):
        n_lanes = min(LANES, n_sub - first)
        search_tile(x_f32, first, n_lanes, TOP, STEPS, FIRST, scratch_f32)
        for lane in range(0, n_lanes, 8):
            i = (first + lane) // 8
            x = x_f32[256 * i : 256 * i + 256]
            block = out_u8[144 * i : 144 * i + 144]
            write_head(state, lane, block)
            inverses = state[FIT_INVERSE + lane : FIT_INVERSE + lane + 8]
            minima = state[FIT_MIN + lane : FIT_MIN + lane + 8]
            _write_quants(x, inverses, minima, scratch_f32, block)
