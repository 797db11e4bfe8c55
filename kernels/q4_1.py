"""Q4_1: 32 unsigned 4-bit quants, a scale and a minimum; value = d * q + m.

Block of 20 bytes (ggml-common.h, block_q4_1): d and m as binary16, then 16 bytes; the low half of
byte j is quant j, its high half quant j + 16.

Loops run over `quants.size`, not 16: LLVM unrolls a loop of known length before it tries to
vectorise, and then finds nothing (half the speed).
"""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import float_to_half, half_to_float


@njit(cache=True, nogil=True, error_model="numpy")
def decode_q4_1(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_q4_1).

    Parameters
    ----------
    raw_u8 : (n_blocks * 20,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 32,) float32
        written
    """
    n_blocks = raw_u8.size // 20
    for i in range(n_blocks // 2):  # two side by side: too long a loop to be unrolled first
        two = raw_u8[40 * i : 40 * i + 40]
        y = out_f32[64 * i : 64 * i + 64]
        d0, m0 = half_to_float(two[0], two[1]), half_to_float(two[2], two[3])
        d1, m1 = half_to_float(two[20], two[21]), half_to_float(two[22], two[23])
        for j in range(16):
            y[j] = np.float32(np.int32(two[4 + j] & 15)) * d0 + m0
            y[16 + j] = np.float32(np.int32(two[4 + j] >> 4)) * d0 + m0
            y[32 + j] = np.float32(np.int32(two[24 + j] & 15)) * d1 + m1
            y[48 + j] = np.float32(np.int32(two[24 + j] >> 4)) * d1 + m1
    for i in range(n_blocks // 2 * 2, n_blocks):
        block = raw_u8[20 * i : 20 * i + 20]
        quants = block[4:]
        y = out_f32[32 * i : 32 * i + 32]
        d = half_to_float(block[0], block[1])
        m = half_to_float(block[2], block[3])
        for j in range(quants.size):
            y[j] = np.float32(np.int32(quants[j] & 15)) * d + m
        for j in range(quants.size):
            y[16 + j] = np.float32(np.int32(quants[j] >> 4)) * d + m


@njit(cache=True, nogil=True, error_model="numpy")
def encode_q4_1(x_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_q4_1_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 32,) float32
        finite values
    out_u8 : (n_blocks * 20,) uint8
        written
    """
    for i in range(x_f32.size // 32):
        x = x_f32[32 * i : 32 * i + 32]
        block = out_u8[20 * i : 20 * i + 20]
        quants = block[4:]
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
        d = np.float32((largest - smallest) / np.float32(15.0))
        scale = np.float32(np.float32(1.0) / d) if d != 0 else np.float32(0.0)
        half = float_to_half(d)
        block[0] = half & 255
        block[1] = half >> 8
        half = float_to_half(smallest)
        block[2] = half & 255
        block[3] = half >> 8
        for j in range(quants.size):
            low = np.float32((x[j] - smallest) * scale + np.float32(0.5))
            high = np.float32((x[16 + j] - smallest) * scale + np.float32(0.5))
            # 1 / d overflows for a denormal d; C's cast of infinity or NaN gives 0 on x86
            low_q = np.int32(low) if abs(low) < 32 else np.int32(0)
            high_q = np.int32(high) if abs(high) < 32 else np.int32(0)
            quants[j] = np.uint8(min(low_q, 15) | (min(high_q, 15) << 4))
