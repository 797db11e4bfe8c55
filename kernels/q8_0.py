"""Q8_0: 32 signed 8-bit quants and one scale; value = d * q.

Block of 34 bytes (ggml-common.h, block_q8_0): d as binary16, then 32 int8.

Loops run over `x.size`, not 32: LLVM unrolls a loop of known length before it tries to vectorise,
and then finds nothing (half the speed).
"""

import numpy as np
from numba import njit

from edgemerge.kernels.llvm import is_arm64
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
        d0 = _step(four[0], four[1])
        d1 = _step(four[34], four[35])
        d2 = _step(four[68], four[69])
        d3 = _step(four[102], four[103])
        for j in range(32):
            y[j] = _multiple(four[2 + j]) * d0
            y[32 + j] = _multiple(four[36 + j]) * d1
            y[64 + j] = _multiple(four[70 + j]) * d2
            y[96 + j] = _multiple(four[104 + j]) * d3
    for i in range(n_blocks // 4 * 4, n_blocks):
        block = raw_u8[34 * i : 34 * i + 34]
        y = out_f32[32 * i : 32 * i + 32]
        d = _step(block[0], block[1])
        for j in range(y.size):
            y[j] = _multiple(block[2 + j]) * d


@njit(cache=True, nogil=True, error_model="numpy")
def _multiple(quant):
    # Of 256 on AArch64, which _step takes back: LLVM widens 16-bit numbers well, and signed bytes badly.
    if is_arm64():
        return np.float32(np.int16(np.uint16(quant) << np.uint16(8)))
    return np.float32(np.int8(quant))


@njit(cache=True, nogil=True, error_model="numpy")
def _step(low, high):
    d = half_to_float(low, high)
    return np.float32(d * np.float32(2.0**-8)) if is_arm64() else d


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
    n_blocks = x_f32.size // 32
    for i in range(n_blocks // 4):  # side by side, as in decode_q8_0
        x = x_f32[128 * i : 128 * i + 128]
        four = out_u8[136 * i : 136 * i + 136]
        largest_0 = largest_1 = largest_2 = largest_3 = np.int32(0)
        for j in range(32):
            largest_0 = max(largest_0, _magnitude(x[j]))
            largest_1 = max(largest_1, _magnitude(x[32 + j]))
            largest_2 = max(largest_2, _magnitude(x[64 + j]))
            largest_3 = max(largest_3, _magnitude(x[96 + j]))
        scale_0 = _write_scale(largest_0, 0, four)
        scale_1 = _write_scale(largest_1, 34, four)
        scale_2 = _write_scale(largest_2, 68, four)
        scale_3 = _write_scale(largest_3, 102, four)
        for j in range(32):
            four[2 + j] = _round(np.float32(x[j] * scale_0))
            four[36 + j] = _round(np.float32(x[32 + j] * scale_1))
            four[70 + j] = _round(np.float32(x[64 + j] * scale_2))
            four[104 + j] = _round(np.float32(x[96 + j] * scale_3))
    for i in range(n_blocks // 4 * 4, n_blocks):
        x = x_f32[32 * i : 32 * i + 32]
        block = out_u8[34 * i : 34 * i + 34]
        largest = np.int32(0)
        for j in range(x.size):
            largest = max(largest, _magnitude(x[j]))
        scale = _write_scale(largest, 0, block)
        for j in range(x.size):
            block[2 + j] = _round(np.float32(x[j] * scale))


@njit(cache=True, nogil=True, error_model="numpy")
def _magnitude(x):
    # As an integer: LLVM vectorises no float maximum.
    return np.int32(np.float32(x).view(np.int32) & np.int32(0x7FFFFFFF))


@njit(cache=True, nogil=True, error_model="numpy")
def _write_scale(magnitude, at, blocks):
    # 1 / d overflows for a denormal d, and C's cast of infinity or NaN gives 0 on x86: as a scale of 0 does.
    d = np.float32(np.int32(magnitude).view(np.float32) / np.float32(127.0))
    half = float_to_half(d)
    blocks[at] = half & 255
    blocks[at + 1] = half >> 8
    scale = np.float32(np.float32(1.0) / d)
    return scale if scale != np.float32(np.inf) else np.float32(0.0)


@njit(cache=True, nogil=True, error_model="numpy")
def _round(v):
    # roundf, halves away from zero, of less than 2^13: quarters are cut off, the rest is done in 16 bits.
    quarters = np.int16(np.float32(v * np.float32(4.0)))
    sign = np.int16(quarters >> np.int16(15))
    raised = np.int16(np.int16(quarters + sign) + np.int16(2))
    return np.uint8(np.uint16(raised) >> np.uint16(2))
