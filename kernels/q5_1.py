"""Q5_1: 32 unsigned 5-bit quants, a scale and a minimum; value = d * q + m.

Block of 24 bytes (ggml-common.h, block_q5_1): d and m as binary16, 32 fifth bits (bit j belongs to
quant j), then 16 bytes; the low half of byte j is of quant j, its high half of quant j + 16.

Loops run over `quants.size`, not 16: LLVM unrolls a loop of known length before it tries to
vectorise, and then finds nothing (half the speed).
"""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import float_to_half, half_to_float


@njit(cache=True, nogil=True, error_model="numpy")
def decode_q5_1(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_q5_1).

    Parameters
    ----------
    raw_u8 : (n_blocks * 24,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 32,) float32
        written
    """
    for i in range(raw_u8.size // 24):
        block = raw_u8[24 * i : 24 * i + 24]
        quants = block[8:]
        y = out_f32[32 * i : 32 * i + 32]
        d = half_to_float(block[0], block[1])
        m = half_to_float(block[2], block[3])
        fifth = np.int32(block[4]) | np.int32(block[5]) << 8
        fifth = np.int32(fifth | np.int32(block[6]) << 16 | np.int32(block[7]) << 24)
        for j in range(16):
            q = np.int32(quants[j] & 15) | np.int32(fifth >> np.int32(j)) << 4 & 16
            y[j] = np.float32(np.int32(q)) * d + m
            q = np.int32(quants[j] >> 4) | np.int32(fifth >> np.int32(j + 16)) << 4 & 16
            y[16 + j] = np.float32(np.int32(q)) * d + m


@njit(cache=True, nogil=True, error_model="numpy")
def encode_q5_1(x_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_q5_1_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 32,) float32
        finite values
    out_u8 : (n_blocks * 24,) uint8
        written
    """
    for i in range(x_f32.size // 32):
        x = x_f32[32 * i : 32 * i + 32]
        block = out_u8[24 * i : 24 * i + 24]
        quants = block[8:]
        # As integers of the same order, as LLVM vectorises no float minimum.
        low_key = np.int32(0x7FFFFFFF)
        high_key = np.int32(-0x80000000)
        for j in range(x.size):
            key = np.float32(x[j]).view(np.int32)
            key = np.int32(key ^ np.int32(np.int32(key >> 31) & np.int32(0x7FFFFFFF)))
            low_key = min(low_key, key)
            high_key = max(high_key, key)
        low_key = np.int32(low_key ^ np.int32(np.int32(low_key >> 31) & np.int32(0x7FFFFFFF)))
        high_key = np.int32(high_key ^ np.int32(np.int32(high_key >> 31) & np.int32(0x7FFFFFFF)))
        smallest = np.int32(low_key).view(np.float32)
        largest = np.int32(high_key).view(np.float32)
        if smallest == 0 or largest == 0:  # of zeros with both signs ggml takes the first
            smallest = x[0]
            largest = x[0]
            for j in range(1, 32):
                smallest = x[j] if x[j] < smallest else smallest
                largest = x[j] if x[j] > largest else largest
        d = np.float32((largest - smallest) / np.float32(31.0))
        scale = np.float32(np.float32(1.0) / d) if d != 0 else np.float32(0.0)
        half = float_to_half(d)
        block[0] = half & 255
        block[1] = half >> 8
        half = float_to_half(smallest)
        block[2] = half & 255
        block[3] = half >> 8
        fifth = np.uint32(0)
        for j in range(quants.size):
            low = np.float32((x[j] - smallest) * scale + np.float32(0.5))
            high = np.float32((x[16 + j] - smallest) * scale + np.float32(0.5))
            # 1 / d overflows for a denormal d; C's cast of infinity or NaN gives 0 on x86
            low_q = np.uint32(np.int32(low) if abs(low) < 64 else np.int32(0))
            high_q = np.uint32(np.int32(high) if abs(high) < 64 else np.int32(0))
            quants[j] = np.uint8(low_q & 15 | (high_q & 15) << 4)
            fifth = np.uint32(fifth | (low_q >> 4) << np.uint32(j))
            fifth = np.uint32(fifth | (high_q >> 4) << np.uint32(j + 16))
        for j in range(4):
            block[4 + j] = np.uint8(fifth >> np.uint32(8 * j) & 255)
