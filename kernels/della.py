"""DELLA's MagPrune: drop at random, small magnitudes more often (Deep et al. 2024, section 3.1)."""

import numpy as np
from numba import njit

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
MAGNITUDE = np.uint32(0x7FFFFFFF)
RADIX = 2048  # three digits of 11 bits cover the 31 bits of a magnitude


@njit(cache=True, nogil=True)
def rank_mask(key, first, n_cols, density, epsilon, unbiased, scratch_u32, delta_f32, mask_u8):
    """Keep each element with a probability that grows with its rank in its row.

    Ranks r = 0 .. n_cols - 1 ascend by magnitude, ties by index; the probability is
    `density - epsilon + r / (n_cols - 1) * 2 * epsilon`, and `density` in a row of one.

    Parameters
    ----------
    key : uint64
        hash of seed, model and tensor
    first : uint64
        flat index of element 0 in its tensor
    n_cols : int
        elements in one row
    density, epsilon : float
        mean probability to keep, and half the span over the ranks
    unbiased : bool
        divide what is kept by its own probability, as the authors' code does
    scratch_u32 : (2 * n_cols + RADIX,) uint32
        overwritten with nothing of use
    delta_f32 : (n_rows * n_cols,) float32
        task vector; overwritten with `unbiased` only
    mask_u8 : (n_rows * n_cols,) uint8
        written: 1 keep, 0 drop
    """
    order = scratch_u32[:n_cols]
    spare = scratch_u32[n_cols : 2 * n_cols]
    counts = scratch_u32[2 * n_cols : 2 * n_cols + RADIX]
    bits = delta_f32.view(np.uint32)
    for start in range(0, bits.size, n_cols):
        for i in range(n_cols):
            spare[i] = np.uint32(i)
        # A stable radix sort of indices, one digit of the magnitude at a time.
        for digit in range(3):
            shift = np.uint32(11 * digit)
            for j in range(RADIX):
                counts[j] = np.uint32(0)
            for i in range(n_cols):
                magnitude = bits[start + i] & MAGNITUDE
                counts[(magnitude >> shift) & np.uint32(RADIX - 1)] += np.uint32(1)
            total = np.uint32(0)
            for j in range(RADIX):
                count = counts[j]
                counts[j] = total
                total = np.uint32(total + count)
            source = spare if digit != 1 else order
            target = order if digit != 1 else spare
            for i in range(n_cols):
                index = source[i]
                magnitude = bits[start + np.int64(index)] & MAGNITUDE
                j = (magnitude >> shift) & np.uint32(RADIX - 1)
                target[counts[j]] = index
                counts[j] += np.uint32(1)
        for rank in range(n_cols):
            i = np.int64(order[rank])
            share = density
            if n_cols > 1:
                share = density - epsilon + rank / (n_cols - 1) * 2.0 * epsilon
            z = np.uint64(key) + (np.uint64(first) + np.uint64(start + i)) * GAMMA
            z = (z ^ (z >> np.uint64(30))) * MIX_1
            z = (z ^ (z >> np.uint64(27))) * MIX_2
            z = z ^ (z >> np.uint64(31))
            kept = np.float64(z >> np.uint64(40)) < share * 16777216.0
            mask_u8[start + i] = np.uint8(kept)
            if unbiased and kept:
                delta_f32[start + i] /= np.float32(share)
