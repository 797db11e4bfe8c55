"""Compiled into the kernels that call it: binary16, roundings, sums of one order, packed scales, exp, log."""

import numpy as np
from numba import njit

from edgemerge.kernels.llvm import converts_halves, to_half, widen_half

LANES = (
    32  # partial sums of a row: several vectors, so that no addition waits for the one before it
)

LOG2_E = 1.4426950408889634
LN2_HIGH = 0.6931471803691238  # 33 bits of ln 2, so that a whole number of them is exact
LN2_LOW = 1.9082149292705877e-10
HIGHEST_SQRT = 1.4142135623730951


@njit(cache=True, nogil=True, error_model="numpy")
def half_to_float(low, high):
    """Widen the binary16 of two bytes, the lower first; its two branches are explained in half.py."""
    bits = np.uint32(np.uint32(low) | (np.uint32(high) << 8))
    if converts_halves():
        return widen_half(np.uint16(bits))
    magnitude = np.uint32(bits & 0x7FFF)
    normal = np.uint32((magnitude << 13) + 0x70000000).view(np.float32)
    normal = np.float32(normal * np.float32(2.0**-112))
    denormal = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24))
    value = np.float32(denormal if magnitude < 0x0400 else normal)
    # Of a condition LLVM makes a branch, and half of all scales are negative: no processor foresees which.
    sign = np.uint32(np.uint32(bits & 0x8000) << 16)
    return np.uint32(value.view(np.uint32) | sign).view(np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def float_to_half(x):
    """Round a float32 to the bits of a binary16, as encode_f16 of half.py does."""
    if converts_halves():
        return np.uint32(to_half(x))
    bits = np.uint32(np.float32(x).view(np.uint32))
    magnitude = np.uint32(bits & 0x7FFFFFFF)
    value = np.float32(np.uint32(magnitude).view(np.float32) * np.float32(2.0**112))
    value = np.float32(value * np.float32(2.0**-110))
    exponent = max(np.uint32(magnitude & 0x7F800000), np.uint32(0x38800000))
    rounded = np.float32(np.uint32(exponent + 0x07800000).view(np.float32) + value)
    pattern = np.uint32(rounded.view(np.uint32))
    half = np.uint32(((pattern >> 13) & 0x7C00) + (pattern & 0x0FFF))
    half = np.uint32(0x7E00) if magnitude > 0x7F800000 else half
    return np.uint32((bits >> 16) & 0x8000 | half)


@njit(cache=True, nogil=True, error_model="numpy")
def nearest_int(v):
    """Round to the nearest int32, to even, through the bits of v + 1.5 * 2^23 (ggml's nearest_int).

    What it makes of infinity, NaN and |v| >= 2^22 decides the bytes of rows of extremes, so that is kept.
    """
    bits = np.int32(np.float32(v + np.float32(12582912.0)).view(np.int32))
    return np.int32(np.int32(bits & np.int32(0x7FFFFF)) - np.int32(0x400000))


@njit(cache=True, nogil=True)
def fold_lanes(lanes):
    """Add the upper half of partial sums to the lower one until one is left; a power of two of them."""
    width = lanes.size // 2
    while width > 0:
        for k in range(width):
            lanes[k] += lanes[width + k]
        width //= 2
    return lanes[0]


@njit(cache=True, nogil=True)
def dot(left, right, lanes):
    """Add the products of two vectors in float64: column i into partial sum i % LANES, then `fold_lanes`."""
    whole = left.size // LANES * LANES
    for k in range(LANES):
        lanes[k] = 0.0
    for i in range(0, whole, LANES):
        # Slices, whose indices LLVM sees not to be negative, and a length that it does not know: else it
        # unrolls the loop before it tries to vectorise, and finds nothing on NEON.
        a = left[i : i + LANES]
        b = right[i : i + LANES]
        for k in range(lanes.size):
            lanes[k] += np.float64(a[k]) * np.float64(b[k])
    a = left[whole:]
    b = right[whole:]
    for k in range(a.size):
        lanes[k] += np.float64(a[k]) * np.float64(b[k])
    return fold_lanes(lanes)


@njit(cache=True, nogil=True, error_model="numpy")
def exp(x):
    """Return e^x in float64, for x <= 0 but for rounding; 0 below -700.

    Additions and multiplications alone: C libraries differ in the last bit from processor to processor.
    """
    # 2^n e^r with |r| <= ln(2) / 2, and e^r by its series, whose rest is below 1e-17.
    if x < -700.0:
        return 0.0
    n = np.int64(x * LOG2_E - 0.5)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    e = 1.0 / 6227020800.0
    e = e * r + 1.0 / 479001600.0
    e = e * r + 1.0 / 39916800.0
    e = e * r + 1.0 / 3628800.0
    e = e * r + 1.0 / 362880.0
    e = e * r + 1.0 / 40320.0
    e = e * r + 1.0 / 5040.0
    e = e * r + 1.0 / 720.0
    e = e * r + 1.0 / 120.0
    e = e * r + 1.0 / 24.0
    e = e * r + 1.0 / 6.0
    e = e * r + 0.5
    e = e * r + 1.0
    e = e * r + 1.0
    return e * np.int64((n + 1023) << 52).view(np.float64)


@njit(cache=True, nogil=True, error_model="numpy")
def log(x):
    """Return the natural logarithm in float64 of x > 0, which is normal; in the manner of `exp`."""
    # x = 2^n m with m around 1, and log m = 2 artanh((m - 1) / (m + 1)) by its series.
    bits = np.float64(x).view(np.int64)
    n = (bits >> 52) - 1023
    m = np.int64((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000).view(np.float64)
    if m > HIGHEST_SQRT:
        m *= 0.5
        n += 1
    f = (m - 1.0) / (m + 1.0)
    s = f * f
    e = 1.0 / 23.0
    e = e * s + 1.0 / 21.0
    e = e * s + 1.0 / 19.0
    e = e * s + 1.0 / 17.0
    e = e * s + 1.0 / 15.0
    e = e * s + 1.0 / 13.0
    e = e * s + 1.0 / 11.0
    e = e * s + 1.0 / 9.0
    e = e * s + 1.0 / 7.0
    e = e * s + 1.0 / 5.0
    e = e * s + 1.0 / 3.0
    e = e * s + 1.0
    return n * LN2_HIGH + (n * LN2_LOW + 2.0 * f * e)


@njit(cache=True, nogil=True, error_model="numpy")
def all_scales_and_minima(raw, at):
    """Return d, dmin, and all scales and minima of a block of Q4_K or Q5_K (get_scale_min_k4).

    Parameters
    ----------
    raw : (n,) uint8
        blocks
    at : uint64
        where the block starts, with these; an unsigned number needs no test for what counts from the end

    Returns
    -------
    d, dmin : float32
    scales, minima : uint64
        of the eight sub-blocks, a byte each
    """
    d = half_to_float(raw[at], raw[at + np.uint64(1)])
    dmin = half_to_float(raw[at + np.uint64(2)], raw[at + np.uint64(3)])
    first, second = read_word(raw, at + np.uint64(4)), read_word(raw, at + np.uint64(8))
    third = read_word(raw, at + np.uint64(12))
    upper = np.uint32(np.uint32(first >> np.uint32(2)) & np.uint32(0x30303030))
    more_scales = np.uint32(np.uint32(third & np.uint32(0x0F0F0F0F)) | upper)
    upper = np.uint32(np.uint32(second >> np.uint32(2)) & np.uint32(0x30303030))
    lower = np.uint32(np.uint32(third >> np.uint32(4)) & np.uint32(0x0F0F0F0F))
    scales = _eight_bytes(np.uint32(first & np.uint32(0x3F3F3F3F)), more_scales)
    minima = _eight_bytes(np.uint32(second & np.uint32(0x3F3F3F3F)), np.uint32(lower | upper))
    return d, dmin, scales, minima


@njit(cache=True, nogil=True, error_model="numpy")
def read_word(raw, at):
    """Return the four bytes from `at` on as a uint32, the first as the lowest; `at` is a uint64."""
    low = np.uint32(np.uint32(raw[at]) | np.uint32(raw[at + np.uint64(1)]) << np.uint32(8))
    high = np.uint32(raw[at + np.uint64(2)]) | np.uint32(raw[at + np.uint64(3)]) << np.uint32(8)
    return np.uint32(low | np.uint32(np.uint32(high) << np.uint32(16)))


@njit(cache=True, nogil=True, error_model="numpy")
def _eight_bytes(low, high):
    return np.uint64(np.uint64(low) | np.uint64(np.uint64(high) << np.uint64(32)))


@njit(cache=True, nogil=True, error_model="numpy")
def times_byte(d, word, j):
    """Return d times byte j of a uint64, as float32."""
    byte = np.uint64(np.uint64(word >> np.uint64(8 * j)) & np.uint64(255))
    return np.float32(d * np.float32(np.int32(byte)))
