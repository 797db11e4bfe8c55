"""Q5_0: 32 signed 5-bit quants and one scale; value = d * (q - 16).

Block of 22 bytes (ggml-common.h, block_q5_0): d as binary16, 32 fifth bits (bit j belongs to quant
j), then 16 bytes; the low half of byte j is of quant j, its high half of quant j + 16.

Loops run over `quants.size`, not 16: LLVM unrolls a loop of known length before it tries to
vectorise, and then finds nothing (half the speed).
"""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import float_to_half, half_to_float, read_word


@njit(cache=True, nogil=True, error_model="numpy")
def decode_q5_0(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_q5_0).

    Parameters
    ----------
    raw_u8 : (n_blocks * 22,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 32,) float32
        written
    """
    for i in range(raw_u8.size // 22):
        at, y = np.uint64(22) * np.uint64(i), np.uint64(32) * np.uint64(i)
        quants, high_y = at + np.uint64(6), y + np.uint64(16)
        d = half_to_float(raw_u8[at], raw_u8[at + np.uint64(1)])
        # Shifted by j, bit 4 of each is the fifth bit of quant j, and of quant j + 16.
        fifth = read_word(raw_u8, at + np.uint64(2))
        low_fifth = np.int32(np.uint32(fifth & np.uint32(0xFFFF)) << np.uint32(4))
        high_fifth = np.int32(fifth >> np.uint32(12))
        for j in range(np.uint64(16)):
            byte = raw_u8[quants + j]
            low, high = np.uint8(byte & np.uint8(15)), np.uint8(byte >> np.uint8(4))
            q = np.int32(
                np.int32(low) | np.int32(np.int32(low_fifth >> np.int32(j)) & np.int32(16))
            )
            out_f32[y + j] = np.float32(np.int32(q - np.int32(16))) * d
            q = np.int32(
                np.int32(high) | np.int32(np.int32(high_fifth >> np.int32(j)) & np.int32(16))
            )
            out_f32[high_y + j] = np.float32(np.int32(q - np.int32(16))) * d


@njit(cache=True, nogil=True, error_model="numpy")
def encode_q5_0(x_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_q5_0_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 32,) float32
        finite values
    out_u8 : (n_blocks * 22,) uint8
        written
    """
    for i in range(x_f32.size // 32):
        x = x_f32[32 * i : 32 * i + 32]
        block = out_u8[22 * i : 22 * i + 22]
        quants = block[6:]
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
        d = np.float32(extreme / np.float32(-16.0))
        scale = np.float32(np.float32(1.0) / d) if d != 0 else np.float32(0.0)
        half = float_to_half(d)
        block[0] = half & 255
        block[1] = half >> 8
        fifth = np.uint32(0)
        for j in range(quants.size):
            low = np.float32(x[j] * scale + np.float32(16.5))
            high = np.float32(x[16 + j] * scale + np.float32(16.5))
            # 1 / d overflows for a denormal d; C's cast of infinity or NaN gives 0 on x86
            low_q = np.int32(low) if abs(low) < 64 else np.int32(0)
            high_q = np.int32(high) if abs(high) < 64 else np.int32(0)
            low_q = np.uint32(min(low_q, 31))
            high_q = np.uint32(min(high_q, 31))
            quants[j] = np.uint8(low_q & 15 | (high_q & 15) << 4)
            fifth = np.uint32(fifth | (low_q >> 4) << np.uint32(j))
            fifth = np.uint32(fifth | (high_q >> 4) << np.uint32(j + 16))
        for j in range(4):
            block[2 + j] = np.uint8(fifth >> np.uint32(8 * j) & 255)
