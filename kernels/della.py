"""DELLA's MagPrune: drop at random, small magnitudes more often (Deep et al. 2024, section 3.1).

An element is kept where its draw is below a bound that grows with its rank in its row. Few draws fall
between the bounds of the first and the last rank, and of those nearly all are settled by a histogram of
the row, which says between which ranks an element lies. Only what is left is ranked one by one, and a
row is sorted only where that would take longer: 2 ns an element instead of 5 for sorting every row.
"""

import numpy as np
from numba import njit

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
MAGNITUDE = np.uint32(0x7FFFFFFF)
RADIX = 2048  # most bins of the histogram; three digits of 11 bits cover the 31 bits of a magnitude
MAX_COUNTED = 64  # elements whose ranks are counted one by one before sorting the row is faster
# A row of no larger magnitudes has one bin, since the scale of its bins could overflow.
TINY = np.float32(1e-30)


@njit(cache=True, nogil=True)
def _sort_row(bits, counts, spare, order):
    # A stable radix sort of indices, one digit of the magnitude at a time.
    n = bits.size
    for i in range(n):
        spare[i] = np.uint32(i)
    for digit in range(3):
        shift = np.uint32(11 * digit)
        for j in range(RADIX):
            counts[j] = np.uint32(0)
        for i in range(n):
            counts[((bits[i] & MAGNITUDE) >> shift) & np.uint32(RADIX - 1)] += np.uint32(1)
        total = np.uint32(0)
        for j in range(RADIX):
            count = counts[j]
            counts[j] = total
            total = np.uint32(total + count)
        source = spare if digit != 1 else order
        target = order if digit != 1 else spare
        for i in range(n):
            index = source[i]
            j = ((bits[np.int64(index)] & MAGNITUDE) >> shift) & np.uint32(RADIX - 1)
            target[counts[j]] = index
            counts[j] += np.uint32(1)


@njit(cache=True, nogil=True)
def _draw(key, first, draws):
    # The top 24 bits of splitmix64, as in dare.py.
    for i in range(draws.size):
        z = np.uint64(key) + (np.uint64(first) + np.uint64(i)) * GAMMA
        z = (z ^ (z >> np.uint64(30))) * MIX_1
        z = (z ^ (z >> np.uint64(27))) * MIX_2
        z = z ^ (z >> np.uint64(31))
        draws[i] = np.uint32(z >> np.uint64(40))


@njit(cache=True, nogil=True)
def _count_bins(bits, n_bins, bins, ends):
    # Bins of equal width up to the largest magnitude, and for each the elements in it and below. Products
    # are rounded but keep their order, so a bin below holds smaller magnitudes.
    largest = np.uint32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & MAGNITUDE)
    values = bits.view(np.float32)
    top = np.uint32(largest).view(np.float32)
    scale = np.float32(np.float32(n_bins - 1) / top) if top > TINY else np.float32(0.0)
    last = np.float32(n_bins - 1)
    for i in range(bits.size):
        # What a difference of finite numbers may overflow to, infinity, comes last here: scale is 0 then,
        # and the product no number.
        position = np.float32(abs(values[i]) * scale)
        bins[i] = np.uint32(np.int32(position if position < last else last))
    for j in range(n_bins + 1):
        ends[j] = np.uint32(0)
    for i in range(bits.size):
        ends[np.int64(bins[i]) + 1] += np.uint32(1)
    total = np.uint32(0)
    for j in range(n_bins + 1):
        total = np.uint32(total + ends[j])
        ends[j] = total


@njit(cache=True, nogil=True)
def _rank(bits, i):
    # Elements of smaller magnitude, and equal ones that come before.
    own = bits[i] & MAGNITUDE
    rank = 0
    for j in range(i):
        rank += np.int64((bits[j] & MAGNITUDE) <= own)
    for j in range(i + 1, bits.size):
        rank += np.int64((bits[j] & MAGNITUDE) < own)
    return rank


@njit(cache=True, nogil=True)
def _settle(bits, draws, bounds, n_bins, mask, bins, open_, ends):
    # Decide on all but a few elements of a row, which are listed in open_; return how many.
    least = bounds[0]
    most = bounds[bits.size - 1]
    for i in range(bits.size):
        mask[i] = np.uint32(draws[i] < least)
    n_open = 0
    for i in range(bits.size):
        open_[n_open] = np.uint32(i)
        n_open += np.int64((draws[i] >= least) & (draws[i] < most))
    _count_bins(bits, n_bins, bins, ends)
    n_left = 0
    for k in range(n_open):
        i = np.int64(open_[k])
        j = np.int64(bins[i])
        mask[i] = np.uint32(draws[i] < bounds[ends[j]])
        open_[n_left] = np.uint32(i)
        n_left += np.int64(mask[i] == 0) & np.int64(draws[i] < bounds[np.int64(ends[j + 1]) - 1])
    return n_left


@njit(cache=True, nogil=True)
def drop_by_rank(key, first, n_cols, density, epsilon, unbiased, scratch_u32, delta_f32):
    """Keep each element with a probability that grows with its rank in its row, and zero the others.

    Ranks r = 0 .. n_cols - 1 ascend by magnitude, ties by index; the probability is
    `density - epsilon + r / (n_cols - 1) * 2 * epsilon`, and `density` in a row of one.

    Example, with density 0.5, epsilon 0.25 and key 1::

        delta          0.1   -0.6    0.3    0.2   -0.5    0.4
        rank             0      5      2      1      4      3
        probability   0.25   0.75   0.45   0.35   0.65   0.55
        draw          0.34   0.57   0.75   0.97   0.44   0.44
        result           0   -0.6      0      0   -0.5    0.4

    Parameters
    ----------
    key : uint64
        hash of seed, tensor and task vector
    first : uint64
        flat index of element 0 in its tensor
    n_cols : int
        elements in one row
    density, epsilon : float
        mean probability to keep, and half the span over the ranks, which is not negative
    unbiased : bool
        divide what is kept by its own probability, as the authors' code does
    scratch_u32 : (5 * n_cols + RADIX + 1,) uint32
        overwritten with nothing of use
    delta_f32 : (n_rows * n_cols,) float32
        task vector, overwritten
    """
    bounds = scratch_u32[:n_cols]
    draws = scratch_u32[n_cols : 2 * n_cols]
    bins = scratch_u32[2 * n_cols : 3 * n_cols]
    open_ = scratch_u32[3 * n_cols : 4 * n_cols]
    mask = scratch_u32[4 * n_cols : 5 * n_cols]  # 1 keep, 0 drop
    ends = scratch_u32[5 * n_cols : 5 * n_cols + RADIX + 1]
    n_bins = min(n_cols, RADIX)
    for rank in range(n_cols):
        rate = density
        if n_cols > 1:
            rate = density - epsilon + rank / (n_cols - 1) * 2.0 * epsilon
        # A draw is whole, so it is below the bound where it is below the bound rounded up.
        bounds[rank] = np.uint32(max(np.ceil(rate * 16777216.0), 0.0))
    for start in range(0, delta_f32.size, n_cols):
        delta = delta_f32[start : start + n_cols]
        _draw(key, np.uint64(first) + np.uint64(start), draws)
        n_left = n_cols
        if not unbiased:
            n_left = _settle(delta.view(np.uint32), draws, bounds, n_bins, mask, bins, open_, ends)
        if n_left <= MAX_COUNTED and not unbiased:
            for k in range(n_left):
                i = np.int64(open_[k])
                mask[i] = np.uint32(draws[i] < bounds[_rank(delta.view(np.uint32), i)])
        else:
            order = open_
            _sort_row(delta.view(np.uint32), ends, bins, order)
            for rank in range(n_cols):
                i = np.int64(order[rank])
                mask[i] = np.uint32(draws[i] < bounds[rank])
                if unbiased:
                    rate = density
                    if n_cols > 1:
                        rate = density - epsilon + rank / (n_cols - 1) * 2.0 * epsilon
                    delta[i] /= np.float32(rate)
        for i in range(n_cols):
            delta[i] = delta[i] if mask[i] else np.float32(0.0)
