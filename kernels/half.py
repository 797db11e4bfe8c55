"""F16 and BF16, the two 16-bit floats of ggml, as uint16 bit patterns.

AArch64 has instructions that convert halves, and x86-64 with F16C. Elsewhere integers and exact float32
products do it: LLVM's own conversion would call a routine there, which is missing, and Numba then crashes.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.llvm import converts_halves, to_half, widen_half


@njit(cache=True, nogil=True, error_model="numpy")
def decode_f16(bits_u16, out_f32):
    """Widen IEEE binary16; exact, NaNs become quiet (ggml_fp16_to_fp32_row).

    Parameters
    ----------
    bits_u16 : (n,) uint16
        bit patterns
    out_f32 : (n,) float32
        written
    """
    if converts_halves():
        for i in range(bits_u16.size):
            out_f32[i] = widen_half(bits_u16[i])
        return
    for i in range(bits_u16.size):
        bits = np.uint32(bits_u16[i])
        sign = np.uint32((bits & 0x8000) << 16)
        magnitude = np.uint32(bits & 0x7FFF)
        # Exponent moved up by 224, then divided by 2^112: infinity and NaN land on exponent 255.
        normal = np.uint32((magnitude << 13) + 0x70000000).view(np.float32)
        normal = np.float32(normal * np.float32(2.0**-112))
        denormal = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24))
        value = denormal if magnitude < 0x0400 else normal
        out_f32[i] = np.uint32(np.float32(value).view(np.uint32) | sign).view(np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def encode_f16(x_f32, out_u16):
    """Round to IEEE binary16, nearest even; NaNs become 0x7E00 or 0xFE00 (ggml_fp32_to_fp16_row).

    Parameters
    ----------
    x_f32 : (n,) float32
        values
    out_u16 : (n,) uint16
        written; bit patterns
    """
    if converts_halves():
        for i in range(x_f32.size):
            out_u16[i] = to_half(x_f32[i])
        return
    for i in range(x_f32.size):
        bits = np.uint32(np.float32(x_f32[i]).view(np.uint32))
        magnitude = np.uint32(bits & 0x7FFFFFFF)
        # Adding 2^13 times the value's power of two makes float32 round at binary16's last bit;
        # values below binary16's normal range all round at 2^-24. Overflow saturates to infinity.
        value = np.float32(np.uint32(magnitude).view(np.float32) * np.float32(2.0**112))
        value = np.float32(value * np.float32(2.0**-110))
        exponent = max(np.uint32(magnitude & 0x7F800000), np.uint32(0x38800000))
        rounded = np.float32(np.uint32(exponent + 0x07800000).view(np.float32) + value)
        pattern = np.uint32(rounded.view(np.uint32))
        half = np.uint32(((pattern >> 13) & 0x7C00) + (pattern & 0x0FFF))
        half = np.uint32(0x7E00) if magnitude > 0x7F800000 else half
        out_u16[i] = np.uint16((bits >> 16) & 0x8000 | half)


@njit(cache=True, nogil=True, error_model="numpy")
def decode_bf16(bits_u16, out_f32):
    """Widen bfloat16: the upper half of a float32 (ggml_bf16_to_fp32_row).

    Parameters
    ----------
    bits_u16 : (n,) uint16
        bit patterns
    out_f32 : (n,) float32
        written
    """
    for i in range(bits_u16.size):
        out_f32[i] = np.uint32(np.uint32(bits_u16[i]) << 16).view(np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def encode_bf16(x_f32, out_u16):
    """Round to bfloat16, nearest even; denormals kept, NaNs quiet (ggml_fp32_to_bf16_row_ref).

    Parameters
    ----------
    x_f32 : (n,) float32
        values
    out_u16 : (n,) uint16
        written; bit patterns
    """
    for i in range(x_f32.size):
        bits = np.uint32(np.float32(x_f32[i]).view(np.uint32))
        upper = np.uint32(bits >> 16)
        rounded = np.uint32(bits + np.uint32(0x7FFF + (upper & 1))) >> 16
        out_u16[i] = np.uint16(upper | 64 if (bits & 0x7FFFFFFF) > 0x7F800000 else rounded)
