"""Exact selection by magnitude in bounded memory: a radix select on the bits of |x|.

The 31 bits of |x| order floats by magnitude. One pass counts the high 15 of them, a second counts
the low 16 inside the one bin where the wanted rank falls: the k-th magnitude is then known exactly,
ties included, whatever the block size, with 384 KiB of counters.
"""

import numpy as np
from numba import njit

MAGNITUDE = np.uint32(0x7FFFFFFF)


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
    wanted = np.uint32(high)
    for i in range(bits.size):
        magnitude = bits[i] & MAGNITUDE
        if magnitude >> np.uint32(16) == wanted:
            counts_u32[magnitude & np.uint32(0xFFFF)] += np.uint32(1)


@njit(cache=True, nogil=True)
def mask_between(cuts_i64, x_f32, mask_u8, ties_i64):
    """Keep what lies strictly between two magnitudes, and count what equals them.

    Parameters
    ----------
    cuts_i64 : (6,) int64
        low cut (bits of a magnitude), first and last + 1 tie to keep there; then the high cut
    x_f32 : (n,) float32
        finite values
    mask_u8 : (n,) uint8
        written: 1 keep, 0 drop; ties are dropped
    ties_i64 : (2,) int64
        written: ties at the low cut, and at the high cut where that is another
    """
    bits = x_f32.view(np.uint32)
    low = np.uint32(cuts_i64[0])
    high = np.uint32(cuts_i64[3])
    n_low = 0
    n_high = 0
    for i in range(bits.size):
        magnitude = bits[i] & MAGNITUDE
        mask_u8[i] = np.uint8((magnitude > low) & (magnitude < high))
        n_low += np.int64(magnitude == low)
        n_high += np.int64(magnitude == high)
    ties_i64[0] = n_low
    ties_i64[1] = n_high if high != low else 0


@njit(cache=True, nogil=True)
def keep_ties(cuts_i64, seen_i64, x_f32, mask_u8):
    """Keep those ties that are asked for; they are counted in flat index order over a whole tensor.

    Parameters
    ----------
    cuts_i64 : (6,) int64
        as for `mask_between`
    seen_i64 : (2,) int64
        ties in all blocks before, at the low and the high cut; added to
    x_f32 : (n,) float32
        finite values
    mask_u8 : (n,) uint8
        of `mask_between`, overwritten where there are ties
    """
    bits = x_f32.view(np.uint32)
    low = np.uint32(cuts_i64[0])
    high = np.uint32(cuts_i64[3])
    for i in range(bits.size):
        magnitude = bits[i] & MAGNITUDE
        if magnitude == low:
            mask_u8[i] = np.uint8(cuts_i64[1] <= seen_i64[0] < cuts_i64[2])
            seen_i64[0] += 1
        elif magnitude == high:
            mask_u8[i] = np.uint8(cuts_i64[4] <= seen_i64[1] < cuts_i64[5])
            seen_i64[1] += 1
