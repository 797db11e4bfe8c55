"""Q4_0: 32 signed 4-bit quants and one scale; value = d * (q - 8).

Block of 18 bytes (ggml-common.h, block_q4_0): d as binary16, then 16 bytes; the low half of byte j
is quant j, its high half quant j + 16.

Loops run over `quants.size`, not 16: LLVM unrolls a loop of known length before it tries to
vectorise, and then finds nothing (half the speed).
"""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import float_to_half, half_to_float


@njit(cache=True, nogil=True, error_model="numpy")
def decode_q4_0(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_q4_0).

    Parameters
    ----------
    raw_u8 : (n_blocks * 18,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 32,) float32
        written
    """
    n_blocks = raw_u8.size // 18
    for i in range(n_blocks // 2):  # two side by side: too long a loop to be unrolled first
        two = raw_u8[36 * i : 36 * i + 36]
        y = out_f32[64 * i : 64 * i + 64]
        d0 = half_to_float(two[0], two[1])
        d1 = half_to_float(two[18], two[19])
        for j in range(16):
            y[j] = np.float32(np.int32(two[2 + j] & 15) - 8) * d0
            y[16 + j] = np.float32(np.int32(two[2 + j] >> 4) - 8) * d0
            y[32 + j] = np.float32(np.int32(two[20 + j] & 15) - 8) * d1
            y[48 + j] = np.float32(np.int32(two[20 + j] >> 4) - 8) * d1
    for i in range(n_blocks // 2 * 2, n_blocks):
        block = raw_u8[18 * i : 18 * i + 18]
        quants = block[2:]
        y = out_f32[32 * i : 32 * i + 32]
        d = half_to_float(block[0], block[1])
        for j in range(quants.size):
            y[j] = np.float32(np.int32(quants[j] & 15) - 8) * d
        for j in range(quants.size):
            y[16 + j] = np.float32(np.int32(quants[j] >> 4) - 8) * d


@njit(cache=True, nogil=True, error_model="numpy")
def encode_q4_0(x_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_q4_0_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 32,) float32
        finite values
    out_u8 : (n_blocks * 18,) uint8
        written
    """
    for i in range(x_f32.size // 32):
        x = x_f32[32 * i : 32 * i + 32]
        block = out_u8[18 * i : 18 * i + 18]
        quants = block[2:]
        # Value of largest magnitude, the first of equals. Compared as integers, as LLVM vectorises
        # no float maximum; in place, as a helper is not inlined and takes three times as long.
        positive = np.int32(0)
        negative = np.int32(0)
        for j in range(x.size):
            bits = np.float32(x[j]).view(np.int32)
            positive = max(positive, bits)
            negative = max(negative, np.int32(bits ^ np.int32(-0x80000000)))
        extreme = np.int32(positive).view(np.float32)
        if negative > positive:
            extreme = -np.int32(negative).view(np.float32)
        elif negative == positive and positive > 0:
            for j in range(x.size):
                if abs(x[j]) == extreme:
                    extreme = x[j]
                    break
        d = np.float32(extreme / np.float32(-8.0))
        scale = np.float32(np.float32(1.0) / d) if d != 0 else np.float32(0.0)
        half = float_to_half(d)
        block[0] = half & 255
        block[1] = half >> 8
        for j in range(quants.size):
            low = np.float32(x[j] * scale + np.float32(8.5))
            high = np.float32(x[16 + j] * scale + np.float32(8.5))
            # 1 / d overflows for a denormal d; C's cast of infinity or NaN gives 0 on x86
            low_q = np.int32(low) if abs(low) < 32 else np.int32(0)
            high_q = np.int32(high) if abs(high) < 32 else np.int32(0)
            quants[j] = np.uint8(min(low_q, 15) | (min(high_q, 15) << 4))
