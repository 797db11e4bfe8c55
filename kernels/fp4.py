"""MXFP4 and NVFP4: 4-bit floats (E2M1), with a scale of 8 bits for some of them.

A quant's lower three bits number MAGNITUDES, twice those of E2M1; its upper bit is the sign. There is
no negative zero.

MXFP4: value = 2^(e - 128) * magnitude. Block of 17 bytes for 32 values (ggml-common.h, block_mxfp4):
e (E8M0), then 16 bytes; the low half of byte j is quant j, its high half quant j + 16.

NVFP4: blocks of 64 values, four sub-blocks of 16; value = d / 2 * magnitude, with d an unsigned
float of four bits of exponent and three of mantissa (UE4M3). Block of 36 bytes (block_nvfp4): four
scales, then 8 bytes for each sub-block; the low half of byte j is quant j, its high half quant j + 8.
"""

import math

import numpy as np
from numba import njit

from edgemerge.kernels.llvm import is_arm64, stack_bytes
from edgemerge.kernels.scalars import read_word

MAGNITUDES = 0xC8643210  # of kvalues_mxfp4, four bits for each, the first lowest


@njit(cache=True, nogil=True, error_model="numpy")
def _power_of_two(e):
    # ggml_e8m0_to_fp32_half: 2^(e - 128), the lowest two of which are denormal
    bits = np.uint32(0x00200000 << e) if e < 2 else np.uint32((e - 1) << 23)
    return np.uint32(bits).view(np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def _half_ue4m3(code):
    # ggml_ue4m3_to_fp32, which halves as the magnitudes are doubled; the sign bit counts for nothing
    exponent = np.int32(np.int32(code) >> 3 & 15)
    mantissa = np.int32(np.int32(code) & 7)
    if code == 0x7F:
        return np.float32(0.0)
    if exponent == 0:
        return np.float32(np.float32(mantissa) * np.float32(2.0**-10))
    power = np.uint32((exponent + 116) << 23).view(np.float32)  # 2^(exponent - 11)
    return np.float32(np.float32(np.int32(mantissa + 8)) * power)


@njit(cache=True, nogil=True, error_model="numpy")
def _value(q):
    # Signed magnitude, which a shift takes out of a word: SIMD has no quicker table.
    magnitude = np.int32(np.uint32(MAGNITUDES) >> np.uint32(4 * (q & 7)) & 15)
    return np.float32(np.int32(-magnitude if q & 8 else magnitude))


@njit(cache=True, nogil=True, error_model="numpy")
def decode_mxfp4(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_mxfp4).

    Parameters
    ----------
    raw_u8 : (n_blocks * 17,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 32,) float32
        written
    """
    for i in range(raw_u8.size // 17):
        block = raw_u8[17 * i : 17 * i + 17]
        y = out_f32[32 * i : 32 * i + 32]
        step = _power_of_two(np.int32(block[0]))
        for j in range(16):
            q = np.int32(block[1 + j])
            y[j] = _value(np.int32(q & 15)) * step
            y[16 + j] = _value(np.int32(q >> 4)) * step


@njit(cache=True, nogil=True, error_model="numpy")
def decode_nvfp4(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_nvfp4).

    Parameters
    ----------
    raw_u8 : (n_blocks * 36,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 64,) float32
        written
    """
    if is_arm64():  # whose shifts differ from lane to lane
        _decode_by_words(raw_u8, out_f32)
        return
    halves_u8, values_u8 = stack_bytes(), stack_bytes()
    for i in range(raw_u8.size // 36):
        at, y = np.uint64(36) * np.uint64(i), np.uint64(64) * np.uint64(i)
        d0 = _half_ue4m3(raw_u8[at])
        d1 = _half_ue4m3(raw_u8[at + np.uint64(1)])
        d2 = _half_ue4m3(raw_u8[at + np.uint64(2)])
        d3 = _half_ue4m3(raw_u8[at + np.uint64(3)])
        # In bytes, a whole vector of them at a time, and only then in order of the values
        for k in range(np.uint64(32)):
            byte = raw_u8[at + np.uint64(4) + k]
            halves_u8[k] = _signed(np.uint8(byte & np.uint8(15)))
            halves_u8[np.uint64(32) + k] = _signed(np.uint8(byte >> np.uint8(4)))
        for j in range(4):
            for k in range(8):
                values_u8[16 * j + k] = halves_u8[8 * j + k]
                values_u8[16 * j + 8 + k] = halves_u8[32 + 8 * j + k]
        for k in range(np.uint64(16)):
            out_f32[y + k] = _wide(values_u8[k]) * d0
            out_f32[y + np.uint64(16) + k] = _wide(values_u8[np.uint64(16) + k]) * d1
            out_f32[y + np.uint64(32) + k] = _wide(values_u8[np.uint64(32) + k]) * d2
            out_f32[y + np.uint64(48) + k] = _wide(values_u8[np.uint64(48) + k]) * d3


@njit(cache=True, nogil=True, error_model="numpy")
def _decode_by_words(raw_u8, out_f32):
    for i in range(raw_u8.size // 36):
        block = raw_u8[36 * i : 36 * i + 36]
        y = out_f32[64 * i : 64 * i + 64]
        d0 = _half_ue4m3(block[0])
        d1 = _half_ue4m3(block[1])
        d2 = _half_ue4m3(block[2])
        d3 = _half_ue4m3(block[3])
        a0, b0 = read_word(block, np.uint64(4)), read_word(block, np.uint64(8))
        a1, b1 = read_word(block, np.uint64(12)), read_word(block, np.uint64(16))
        a2, b2 = read_word(block, np.uint64(20)), read_word(block, np.uint64(24))
        a3, b3 = read_word(block, np.uint64(28)), read_word(block, np.uint64(32))
        # From words, as LLVM vectorises no loop of eight turns: 11 times the speed of a loop over bytes
        for j in range(16):
            shift = np.uint32(8 * (j & 3) + 4 * (j >> 3))
            last = (j & 4) != 0
            y[j] = _value(np.int32((b0 if last else a0) >> shift & 15)) * d0
            y[16 + j] = _value(np.int32((b1 if last else a1) >> shift & 15)) * d1
            y[32 + j] = _value(np.int32((b2 if last else a2) >> shift & 15)) * d2
            y[48 + j] = _value(np.int32((b3 if last else a3) >> shift & 15)) * d3


@njit(cache=True, nogil=True, error_model="numpy")
def _signed(q):
    # Signed magnitude as a byte, by sums of what is above 4 and 6: SIMD without AVX2 shifts all lanes alike.
    magnitude = np.uint8(q & np.uint8(7))
    over_4 = np.uint8(max(magnitude, np.uint8(4)) - np.uint8(4))
    over_6 = np.uint8(max(magnitude, np.uint8(6)) - np.uint8(6))
    magnitude = np.uint8(np.uint8(magnitude + over_4) + np.uint8(over_6 + over_6))
    sign = np.uint8(255) if q > np.uint8(7) else np.uint8(0)
    return np.uint8(np.uint8(magnitude ^ sign) - sign)


@njit(cache=True, nogil=True, error_model="numpy")
def _wide(value):
    return np.float32(np.int32(np.int8(value)))


@njit(cache=True, nogil=True, error_model="numpy")
def _largest(x):
    # Magnitudes compared as integers, as LLVM vectorises no float maximum.
    largest = np.int32(0)
    for j in range(x.size):
        largest = max(largest, np.int32(np.float32(x[j]).view(np.int32) & np.int32(0x7FFFFFFF)))
    return np.int32(largest).view(np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def _quant(x, step):
    # best_index_mxfp4: the nearest, the first of equals. The differences are taken one by one, as
    # ggml takes them: where the step is too small for x they are all rounded to x.
    magnitude = np.float32(abs(x))
    best = magnitude
    quant = np.int32(0)
    error = np.float32(abs(step - magnitude))
    quant = np.int32(1) if error < best else quant
    best = error if error < best else best
    error = np.float32(abs(np.float32(np.float32(2.0) * step) - magnitude))
    quant = np.int32(2) if error < best else quant
    best = error if error < best else best
    error = np.float32(abs(np.float32(np.float32(3.0) * step) - magnitude))
    quant = np.int32(3) if error < best else quant
    best = error if error < best else best
    error = np.float32(abs(np.float32(np.float32(4.0) * step) - magnitude))
    quant = np.int32(4) if error < best else quant
    best = error if error < best else best
    error = np.float32(abs(np.float32(np.float32(6.0) * step) - magnitude))
    quant = np.int32(5) if error < best else quant
    best = error if error < best else best
    error = np.float32(abs(np.float32(np.float32(8.0) * step) - magnitude))
    quant = np.int32(6) if error < best else quant
    best = error if error < best else best
    error = np.float32(abs(np.float32(np.float32(12.0) * step) - magnitude))
    quant = np.int32(7) if error < best else quant
    sign = np.int32(8) if x < 0 and quant > 0 else np.int32(0)
    return np.int32(quant | sign)


@njit(cache=True, nogil=True, error_model="numpy")
def _encode_run(x, step, quants):
    # 2 n values -> n bytes
    n = quants.size
    for j in range(n):
        quants[j] = np.uint8(_quant(x[j], step) | _quant(x[n + j], step) << 4)


@njit(cache=True, nogil=True, error_model="numpy")
def encode_mxfp4(x_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_mxfp4_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 32,) float32
        finite values
    out_u8 : (n_blocks * 17,) uint8
        written
    """
    for i in range(x_f32.size // 32):
        x = x_f32[32 * i : 32 * i + 32]
        block = out_u8[17 * i : 17 * i + 17]
        largest = _largest(x)
        e = np.int32(0)
        if largest > 0:
            # ggml's log2f rounds to float32 before the floor: up, just below a power of two.
            # & 255: C's cast to uint8, which denormal blocks take below zero
            power = np.float32(math.log2(np.float64(largest)))
            e = np.int32(np.int32(math.floor(power)) + 125 & 255)
        block[0] = np.uint8(e)
        _encode_run(x, _power_of_two(e), block[1:17])


@njit(cache=True, nogil=True, error_model="numpy")
def _float_to_ue4m3(x):
    # ggml_fp32_to_ue4m3, for x >= 0: halves away from zero, and at most 448
    if x > np.float32(448.0):
        x = np.float32(448.0)
    bits = np.int32(np.float32(x).view(np.int32))
    exponent = np.int32((bits >> 23) - 120)
    if exponent <= 0:  # denormal
        rounded = np.float32(np.float32(x * np.float32(512.0)) + np.float32(0.5))
        return min(np.int32(rounded), np.int32(7))
    code = np.int32((exponent << 3 | bits >> 20 & 7) + (bits >> 19 & 1))
    return code if code < 0x78 else np.int32(0x7E)


@njit(cache=True, nogil=True, error_model="numpy")
def encode_nvfp4(x_f32, out_u8):
    """Write the blocks that ggml's reference quantiser makes (quantize_row_nvfp4_ref).

    Parameters
    ----------
    x_f32 : (n_blocks * 64,) float32
        finite values
    out_u8 : (n_blocks * 36,) uint8
        written
    """
    for i in range(x_f32.size // 64):
        block = out_u8[36 * i : 36 * i + 36]
        for j in range(4):
            x = x_f32[64 * i + 16 * j : 64 * i + 16 * j + 16]
            code = _float_to_ue4m3(np.float32(_largest(x) / np.float32(6.0)))
            block[j] = np.uint8(code)
            _encode_run(x, _half_ue4m3(code), block[4 + 8 * j : 12 + 8 * j])
