"""Q4_K: super-blocks of 256 values, eight sub-blocks of 32, each with its own scale and minimum.

value = d * scale * q - dmin * minimum, with q of 4 bits, scale and minimum of 6 bits. Block of
144 bytes (ggml-common.h, block_q4_K): d and dmin as binary16; 12 bytes of scales and minima; 128
bytes, where byte 32 p + j holds quant j of sub-block 2 p below and of sub-block 2 p + 1 above.

The encoder is ggml's quantize_row_q4_K_ref, bit for bit, as affine_search.py explains.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.affine_blocks import fit_of, quant_of, write_head
from edgemerge.kernels.affine_search import (
    FIT,
    FIT_INVERSE,
    FIT_MIN,
    LANES,
    SCRATCH_LEN,
    search_tile,
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
        at, out = np.uint64(144) * np.uint64(i), np.uint64(256) * np.uint64(i)
        d, dmin, scales, minima = all_scales_and_minima(raw_u8, at)
        for j in range(4):
            quants, y = at + np.uint64(16 + 32 * j), out + np.uint64(64 * j)
            step, offset = times_byte(d, scales, 2 * j), times_byte(dmin, minima, 2 * j)
            # The upper four bits are left 16 times too large, which a power of two takes back exactly.
            high_step = np.float32(times_byte(d, scales, 2 * j + 1) * np.float32(1 / 16))
            high_offset = times_byte(dmin, minima, 2 * j + 1)
            for k in range(
                np.uint64(32)
            ):  # two sub-blocks at once: the cache's lines are written in order
                byte = raw_u8[quants + k]
                low, high = np.uint8(byte & np.uint8(0x0F)), np.uint8(byte & np.uint8(0xF0))
                out_f32[y + k] = step * np.float32(np.int32(low)) - offset
                out_f32[y + np.uint64(32) + k] = (
                    high_step * np.float32(np.int32(high)) - high_offset
                )


@njit(cache=True, nogil=True, error_model="numpy")
def _write_quants(x, inverses, minima, block):
    head = all_scales_and_minima(block, np.uint64(0))
    for j in range(4):
        low_fit = fit_of(head, inverses, minima, 2 * j)
        high_fit = fit_of(head, inverses, minima, 2 * j + 1)
        lows, highs, quants = np.uint64(64 * j), np.uint64(64 * j + 32), np.uint64(16 + 32 * j)
        for k in range(np.uint64(32)):  # LLVM takes the conditions of `quant_of` out of the loop
            low = quant_of(x[lows + k], low_fit, TOP)
            high = quant_of(x[highs + k], high_fit, TOP)
            block[quants + k] = np.uint8(low | high << np.int32(4))


@njit(cache=True, nogil=True, error_model="numpy")
def write_quants_q4_k(x_f32, inverses_f32, minima_f32, out_u8):
    """Write the quants of blocks whose scales and minima are written already.

    Parameters
    ----------
    x_f32 : (n_blocks * 256,) float32
        finite values
    inverses_f32, minima_f32 : (n_blocks * 8,) float32
        of the sub-blocks whose scale is zero: quants are round(inverse * (x - minimum))
    out_u8 : (n_blocks * 144,) uint8
        the quants are written
    """
    for i in range(out_u8.size // 144):
        inverses = inverses_f32[8 * i : 8 * i + 8]
        minima = minima_f32[8 * i : 8 * i + 8]
        block = out_u8[144 * i : 144 * i + 144]
        _write_quants(x_f32[256 * i : 256 * i + 256], inverses, minima, block)


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
    fit = scratch_f32[FIT:SCRATCH_LEN]
    n_sub = x_f32.size // 32
    for first in range(0, n_sub, LANES):
        n_lanes = min(LANES, n_sub - first)
        search_tile(x_f32, first, n_lanes, TOP, STEPS, FIRST, scratch_f32)
        for lane in range(0, n_lanes, 8):
            i = (first + lane) // 8
            x = x_f32[256 * i : 256 * i + 256]
            block = out_u8[144 * i : 144 * i + 144]
            write_head(fit, lane, block)
            inverses = fit[FIT_INVERSE + lane : FIT_INVERSE + lane + 8]
            minima = fit[FIT_MIN + lane : FIT_MIN + lane + 8]
            _write_quants(x, inverses, minima, block)
