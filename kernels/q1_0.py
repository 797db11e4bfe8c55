"""Q1_0: 128 signs and one scale; value = d or -d.

Block of 18 bytes (ggml-common.h, block_q1_0): d as binary16, then 16 bytes; bit r of byte j is set
where value 8 j + r is not negative.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import float_to_half, half_to_float


@njit(cache=True, nogil=True, error_model="numpy")
def decode_q1_0(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_q1_0).

    Parameters
    ----------
    raw_u8 : (n_blocks * 18,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 128,) float32
        written
    """
    for i in range(raw_u8.size // 18):
        block = raw_u8[18 * i : 18 * i + 18]
        d = half_to_float(block[0], block[1])
        for j in range(16):
            signs = np.int32(block[2 + j])
            y = out_f32[128 * i + 8 * j : 128 * i + 8 * j + 8]
            for r in range(y.size):
                y[r] = d if signs >> np.int32(r) & 1 else -d


@njit(cache=True, nogil=True, error_model="numpy")
def encode_q1_0(x_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_q1_0_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 128,) float32
        finite values
    out_u8 : (n_blocks * 18,) uint8
        written
    """
    for i in range(x_f32.size // 128):
        x = x_f32[128 * i : 128 * i + 128]
        block = out_u8[18 * i : 18 * i + 18]
        total = np.float32(0.0)
        for j in range(x.size):
            total = np.float32(total + np.float32(abs(x[j])))
        half = float_to_half(np.float32(total / np.float32(128.0)))
        block[0] = half & 255
        block[1] = half >> 8
        for j in range(16):
            signs = np.int32(0)
            for r in range(8):
                bit = np.int32(1) if x[8 * j + r] >= 0 else np.int32(0)
                signs = np.int32(signs | bit << np.int32(r))
            block[2 + j] = np.uint8(signs)
