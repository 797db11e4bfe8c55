"""Q2_0: 64 quants of 2 bits and one scale; value = d * (q - 1), and the encoder writes no q of 3.

Block of 18 bytes (ggml-common.h, block_q2_0): d as binary16, then 16 bytes; quant 4 j + r stands in
bits 2 r and 2 r + 1 of byte j.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import float_to_half, half_to_float, read_word


@njit(cache=True, nogil=True, error_model="numpy")
def decode_q2_0(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_q2_0).

    Parameters
    ----------
    raw_u8 : (n_blocks * 18,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 64,) float32
        written
    """
    for i in range(raw_u8.size // 18):
        block = raw_u8[18 * i : 18 * i + 18]
        d = half_to_float(block[0], block[1])
        y = out_f32[64 * i : 64 * i + 64]
        w0, w1 = read_word(block, np.uint64(2)), read_word(block, np.uint64(6))
        w2, w3 = read_word(block, np.uint64(10)), read_word(block, np.uint64(14))
        # A word for 16 lanes: byte by byte LLVM finds four at most, for a fifth of the speed
        for j in range(16):
            shift = np.uint32(2 * j)
            y[j] = np.float32(np.int32(np.int32(w0 >> shift & 3) - 1)) * d
            y[16 + j] = np.float32(np.int32(np.int32(w1 >> shift & 3) - 1)) * d
            y[32 + j] = np.float32(np.int32(np.int32(w2 >> shift & 3) - 1)) * d
            y[48 + j] = np.float32(np.int32(np.int32(w3 >> shift & 3) - 1)) * d


@njit(cache=True, nogil=True, error_model="numpy")
def encode_q2_0(x_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_q2_0_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 64,) float32
        finite values
    out_u8 : (n_blocks * 18,) uint8
        written
    """
    for i in range(x_f32.size // 64):
        x = x_f32[64 * i : 64 * i + 64]
        block = out_u8[18 * i : 18 * i + 18]
        # Magnitudes compared as integers, as LLVM vectorises no float maximum.
        largest = np.int32(0)
        for j in range(x.size):
            largest = max(largest, np.int32(np.float32(x[j]).view(np.int32) & np.int32(0x7FFFFFFF)))
        d = np.int32(largest).view(np.float32)
        inverse = np.float32(np.float32(1.0) / d) if d > 0 else np.float32(0.0)
        half = float_to_half(d)
        block[0] = half & 255
        block[1] = half >> 8
        block[2:18] = 0
        if inverse == np.float32(np.inf):
            continue  # C's cast of infinity or NaN gives the lowest integer on x86, and then q is 0
        for j in range(16):
            quants = np.int32(0)
            for r in range(4):
                v = np.float32(x[4 * j + r] * inverse)  # in -1 .. 1; halves away from zero
                up = np.int32(1) if v >= np.float32(0.5) else np.int32(0)
                down = np.int32(1) if v <= np.float32(-0.5) else np.int32(0)
                quants = np.int32(quants | (1 + up - down) << np.int32(2 * r))
            block[2 + j] = np.uint8(quants)
