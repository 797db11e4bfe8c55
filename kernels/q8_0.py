"""Q8_0: 32 signed 8-bit quants and one scale; value = d * q.

Block of 34 bytes (ggml-common.h, block_q8_0): d as binary16, then 32 int8.

Loops run over `x.size`, not 32: LLVM unrolls a loop of known length before it tries to vectorise,
and then finds nothing (half the speed).
"""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import float_to_half, half_to_float


@njit(cache=True, nogil=True, error_model="numpy")
def decode_q8_0(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_q8_0).

    Parameters
    ----------
    raw_u8 : (n_blocks * 34,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 32,) float32
        written
    """
    n_blocks = raw_u8.size // 34
    # Four blocks side by side: LLVM unrolls a short loop of known length before it tries to vectorise,
    # and then finds nothing; this body is too long for that. 2.3 times the speed of one by one.
    for i in range(n_blocks // 4):
        four = raw_u8[136 * i : 136 * i + 136]
        y = out_f32[128 * i : 128 * i + 128]
        d0 = half_to_float(four[0], four[1])
        d1 = half_to_float(four[34], four[35])
        d2 = half_to_float(four[68], four[69])
        d3 = half_to_float(four[102], four[103])
        for j in range(32):
            y[j] = np.float32(np.int8(four[2 + j])) * d0
            y[32 + j] = np.float32(np.int8(four[36 + j])) * d1
            y[64 + j] = np.float32(np.int8(four[70 + j])) * d2
            y[96 + j] = np.float32(np.int8(four[104 + j])) * d3
    for i in range(n_blocks // 4 * 4, n_blocks):
        block = raw_u8[34 * i : 34 * i + 34]
        y = out_f32[32 * i : 32 * i + 32]
        d = half_to_float(block[0], block[1])
        for j in range(y.size):
            y[j] = np.float32(np.int8(block[2 + j])) * d


@njit(cache=True, nogil=True, error_model="numpy")
def encode_q8_0(x_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_q8_0_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 32,) float32
        finite values
    out_u8 : (n_blocks * 34,) uint8
        written
    """
    for i in range(x_f32.size // 32):
        x = x_f32[32 * i : 32 * i + 32]
        block = out_u8[34 * i : 34 * i + 34]
        magnitude = np.int32(0)  # as integers: LLVM vectorises no float maximum
        for j in range(x.size):
            magnitude = max(magnitude, np.int32(np.float32(x[j]).view(np.int32) & 0x7FFFFFFF))
        d = np.float32(np.int32(magnitude).view(np.float32) / np.float32(127.0))
        scale = np.float32(np.float32(1.0) / d) if d != 0 else np.float32(0.0)
        half = float_to_half(d)
        block[0] = half & 255
        block[1] = half >> 8
        for j in range(x.size):
            v = np.float32(x[j] * scale)
            # 1 / d overflows for a denormal d; C's cast of infinity or NaN gives 0 on x86
            v = v if abs(v) < 128 else np.float32(0.0)
            q = np.int32(v)  # roundf: halves away from zero
            rest = np.float32(v - np.float32(q))
            q += np.int32(rest >= np.float32(0.5)) - np.int32(rest <= np.float32(-0.5))
            block[2 + j] = np.uint8(q & 255)
