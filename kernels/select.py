"""Exact selection by magnitude in bounded memory: a radix select on the bits of |x|.

The 31 bits of |x| order floats by magnitude. One pass counts the high 15 of them, a second counts
the low 16 inside the one bin where the wanted rank falls: the k-th magnitude is then known exactly,
ties included, whatever the block size, with 384 KiB of counters.
"""

import numpy as np
from numba import njit

MAGNITUDE = np.uint32(0x7FFFFFFF)
LOW = np.uint32(0xFFFF)
GROUP = 32


@njit(cache=True, nogil=True)
def count_high(x_f32, counts_u32):
    """Count magnitudes by their high 15 bits.

    Parameters
    ----------
    x_f32 : (n,) float32
        finite values
    counts_u32 : (32768,) uint32
        running counts, added to
    """
    bits = x_f32.view(np.uint32)
    for i in range(bits.size):
        counts_u32[(bits[i] & MAGNITUDE) >> np.uint32(16)] += np.uint32(1)


@njit(cache=True, nogil=True)
def count_low(x_f32, high, counts_u32):
    """Count by their low 16 bits the magnitudes whose high bits are `high`.

    Parameters
    ----------
    x_f32 : (n,) float32
        finite values
    high : int
        the bin of `count_high` to look into
    counts_u32 : (65536,) uint32
        running counts, added to
    """
    bits = x_f32.view(np.uint32)
    first = np.uint32(np.uint32(high) << np.uint32(16))
    whole = bits.size // GROUP * GROUP
    for start in range(0, whole, GROUP):
        # Most groups have nothing in the bin, which SIMD sees at once.
        found = np.uint32(0)
        for i in range(start, start + GROUP):
            found |= np.uint32(((bits[i] & MAGNITUDE) - first) <= LOW)
        if found:
            for i in range(start, start + GROUP):
                low = np.uint32((bits[i] & MAGNITUDE) - first)
                if low <= LOW:
                    counts_u32[low] += np.uint32(1)
    for i in range(whole, bits.size):
        low = np.uint32((bits[i] & MAGNITUDE) - first)
        if low <= LOW:
            counts_u32[low] += np.uint32(1)


@njit(cache=True, nogil=True)
def count_ties(low, high, x_f32, ties_i64):
    """Count what equals either of two magnitudes.

    Parameters
    ----------
    low, high : int
        bits of two magnitudes
    x_f32 : (n,) float32
        any values
    ties_i64 : (2,) int64
        written: how many equal the one, and the other
    """
    bits = x_f32.view(np.uint32)
    first = np.uint32(low)
    second = np.uint32(high)
    n_first = 0
    n_second = 0
    for i in range(bits.size):
        magnitude = bits[i] & MAGNITUDE
        n_first += np.int64(magnitude == first)
        n_second += np.int64(magnitude == second)
    ties_i64[0] = n_first
    ties_i64[1] = n_second


@njit(cache=True, nogil=True)
def find_tie(magnitude, number, x_f32, index_i64):
    """Find the tie of some number, from 0, among those that equal a magnitude.

    Parameters
    ----------
    magnitude : int
        its bits
    number : int
        less than there are
    x_f32 : (n,) float32
        any values
    index_i64 : (1,) int64
        written
    """
    bits = x_f32.view(np.uint32)
    wanted = np.uint32(magnitude)
    left = number
    for i in range(bits.size):
        if bits[i] & MAGNITUDE == wanted:
            if left == 0:
                index_i64[0] = i
                return
            left -= 1


@njit(cache=True, nogil=True)
def keep_between(low, high, x_f32):
    """Zero what does not lie between two magnitudes, both of which are kept.

    Parameters
    ----------
    low, high : int
        bits of the least and the largest magnitude to keep; nothing is kept where high is less
    x_f32 : (n,) float32
        overwritten
    """
    bits = x_f32.view(np.int32)
    least = np.int32(low)
    most = np.int32(high)
    for i in range(bits.size):
        magnitude = np.int32(bits[i] & np.int32(0x7FFFFFFF))
        bits[i] = bits[i] if (magnitude >= least) & (magnitude <= most) else np.int32(0)
