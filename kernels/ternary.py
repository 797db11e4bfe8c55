"""TQ1_0 and TQ2_0: 256 ternary quants and one scale; value = d * (q - 1), with q of 0, 1 or 2.

TQ1_0: five quants in a byte, most of them base 3. Block of 54 bytes (ggml-common.h, block_tq1_0): 32
bytes for the first 160 values, 16 for the next 80, 4 with four quants each for the last 16, and d as
binary16. Each group is cut into runs as long as it has bytes; byte j holds quant j of each run, the
first run's as the most significant digit, as the fraction digits / 243 in 256ths, rounded up.

TQ2_0: two bits for each quant. Block of 66 bytes (block_tq2_0): each half of the block holds four
runs of 32 quants in 32 bytes, run r in bits 2 r and 2 r + 1; then d as binary16.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import float_to_half, half_to_float, read_word

POWERS = np.array([3 ** (j // 4) for j in range(16)], np.int32)  # of the last 16 values of TQ1_0


@njit(cache=True, nogil=True, error_model="numpy")
def _digit(byte, power):
    # One less than the digit that is the first of byte * power
    fraction = np.int32(byte * power & 255)
    return np.float32(np.int32(np.int32(fraction * 3 >> 8) - 1))


@njit(cache=True, nogil=True, error_model="numpy")
def decode_tq1_0(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_tq1_0).

    Parameters
    ----------
    raw_u8 : (n_blocks * 54,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 256,) float32
        written
    """
    for i in range(raw_u8.size // 54):
        block = raw_u8[54 * i : 54 * i + 54]
        y = out_f32[256 * i : 256 * i + 256]
        d = half_to_float(block[52], block[53])
        # All digits of a byte in one turn: loops of one digit each would be too short to vectorise
        for j in range(32):
            byte = np.int32(block[j])
            y[j] = _digit(byte, 1) * d
            y[32 + j] = _digit(byte, 3) * d
            y[64 + j] = _digit(byte, 9) * d
            y[96 + j] = _digit(byte, 27) * d
            y[128 + j] = _digit(byte, 81) * d
        last = read_word(block, np.uint64(48))
        for j in range(16):
            byte = np.int32(block[32 + j])
            y[160 + j] = _digit(byte, 1) * d
            y[176 + j] = _digit(byte, 3) * d
            y[192 + j] = _digit(byte, 9) * d
            y[208 + j] = _digit(byte, 27) * d
            y[224 + j] = _digit(byte, 81) * d
            byte = np.int32(last >> np.uint32(8 * (j & 3)) & 255)
            y[240 + j] = _digit(byte, POWERS[j]) * d


@njit(cache=True, nogil=True, error_model="numpy")
def decode_tq2_0(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_tq2_0).

    Parameters
    ----------
    raw_u8 : (n_blocks * 66,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 256,) float32
        written
    """
    for i in range(raw_u8.size // 66):
        block = raw_u8[66 * i : 66 * i + 66]
        d = half_to_float(block[64], block[65])
        for half in range(2):
            quants = block[32 * half : 32 * half + 32]
            y = out_f32[256 * i + 128 * half : 256 * i + 128 * half + 128]
            for j in range(32):
                q = np.int32(quants[j])
                y[j] = np.float32(np.int32(np.int32(q & 3) - 1)) * d
                y[32 + j] = np.float32(np.int32(np.int32(q >> 2 & 3) - 1)) * d
                y[64 + j] = np.float32(np.int32(np.int32(q >> 4 & 3) - 1)) * d
                y[96 + j] = np.float32(np.int32(np.int32(q >> 6) - 1)) * d


@njit(cache=True, nogil=True, error_model="numpy")
def _find_scale(x):
    # Magnitudes compared as integers, as LLVM vectorises no float maximum.
    largest = np.int32(0)
    for j in range(x.size):
        largest = max(largest, np.int32(np.float32(x[j]).view(np.int32) & np.int32(0x7FFFFFFF)))
    return np.int32(largest).view(np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def _inverse(d):
    # 1 / d overflows for a denormal d; C's cast of infinity or NaN then gives 0 on x86
    inverse = np.float32(np.float32(1.0) / d)
    return inverse if inverse < np.float32(np.inf) else np.float32(0.0)


@njit(cache=True, nogil=True, error_model="numpy")
def _quant(v):
    # lroundf(v) + 1, halves away from zero
    up = np.int32(1) if v >= np.float32(0.5) else np.int32(0)
    down = np.int32(1) if v <= np.float32(-0.5) else np.int32(0)
    return np.int32(1 + up - down)


@njit(cache=True, nogil=True, error_model="numpy")
def _encode_digits(x, n_digits, inverse, bytes_u8):
    n = bytes_u8.size
    for j in range(n):
        digits = np.int32(0)
        for k in range(5):
            quant = _quant(np.float32(x[k * n + j] * inverse)) if k < n_digits else np.int32(0)
            digits = np.int32(3 * digits + quant)
        bytes_u8[j] = np.uint8(np.int32(256 * digits + 242) // np.int32(243))


@njit(cache=True, nogil=True, error_model="numpy")
def encode_tq1_0(x_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_tq1_0_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 256,) float32
        finite values
    out_u8 : (n_blocks * 54,) uint8
        written
    """
    for i in range(x_f32.size // 256):
        x = x_f32[256 * i : 256 * i + 256]
        block = out_u8[54 * i : 54 * i + 54]
        d = _find_scale(x)
        half = float_to_half(d)
        block[52] = half & 255
        block[53] = half >> 8
        _encode_digits(x[:160], 5, _inverse(d), block[:32])
        _encode_digits(x[160:240], 5, _inverse(d), block[32:48])
        _encode_digits(x[240:], 4, _inverse(d), block[48:52])


@njit(cache=True, nogil=True, error_model="numpy")
def encode_tq2_0(x_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_tq2_0_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 256,) float32
        finite values
    out_u8 : (n_blocks * 66,) uint8
        written
    """
    for i in range(x_f32.size // 256):
        block = out_u8[66 * i : 66 * i + 66]
        d = _find_scale(x_f32[256 * i : 256 * i + 256])
        inverse = _inverse(d)
        half = float_to_half(d)
        block[64] = half & 255
        block[65] = half >> 8
        for r in range(2):
            x = x_f32[256 * i + 128 * r : 256 * i + 128 * r + 128]
            quants = block[32 * r : 32 * r + 32]
            for j in range(quants.size):
                low = _quant(np.float32(x[j] * inverse))
                low = np.int32(low | _quant(np.float32(x[32 + j] * inverse)) << 2)
                high = _quant(np.float32(x[64 + j] * inverse))
                high = np.int32(high | _quant(np.float32(x[96 + j] * inverse)) << 2)
                quants[j] = np.uint8(low | high << 4)
