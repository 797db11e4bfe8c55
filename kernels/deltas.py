"""What a delta needs beside its codecs: how large a change is, what a code loses, sparse values."""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import fold_lanes

LANES = 32  # partial sums, as in kernels/norms.py


@njit(cache=True, nogil=True)
def measure(x_f32, lanes_f64, found_f64):
    """Sum the squares of some numbers, and find the largest magnitude.

    Number i is squared and added in float64 into partial sum i % LANES, and these in halves, each onto the
    other.

    Parameters
    ----------
    x_f32 : (n,) float32
        finite values
    lanes_f64 : (LANES,) float64
        overwritten with nothing of use
    found_f64 : (2,) float64
        written: the sum of squares, the largest magnitude
    """
    whole = x_f32.size // LANES * LANES
    largest = np.int32(0)
    for k in range(LANES):
        lanes_f64[k] = 0.0
    for i in range(0, whole, LANES):
        part = x_f32[i : i + LANES]
        for k in range(lanes_f64.size):
            lanes_f64[k] += np.float64(part[k]) * np.float64(part[k])
    rest = x_f32[whole:]
    for k in range(rest.size):
        lanes_f64[k] += np.float64(rest[k]) * np.float64(rest[k])
    # Magnitudes compared as integers, as LLVM vectorises no float maximum.
    bits = x_f32.view(np.int32)
    for i in range(bits.size):
        largest = max(largest, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
    found_f64[0] = fold_lanes(lanes_f64)
    found_f64[1] = np.float64(np.int32(largest).view(np.float32))


@njit(cache=True, nogil=True)
def squared_error(x_f32, y_f32, lanes_f64, found_f64):
    """Sum the squares of differences, in the order of `measure`.

    Parameters
    ----------
    x_f32, y_f32 : (n,) float32
        finite values
    lanes_f64 : (LANES,) float64
        overwritten with nothing of use
    found_f64 : (1,) float64
        written
    """
    whole = x_f32.size // LANES * LANES
    for k in range(LANES):
        lanes_f64[k] = 0.0
    for i in range(0, whole, LANES):
        x, y = x_f32[i : i + LANES], y_f32[i : i + LANES]
        for k in range(lanes_f64.size):
            difference = np.float64(x[k]) - np.float64(y[k])
            lanes_f64[k] += difference * difference
    x, y = x_f32[whole:], y_f32[whole:]
    for k in range(x.size):
        difference = np.float64(x[k]) - np.float64(y[k])
        lanes_f64[k] += difference * difference
    found_f64[0] = fold_lanes(lanes_f64)


@njit(cache=True, nogil=True)
def scatter(ends_i32, begin, skipped, at_u8, values_f32, out_f32):
    """Put sparse values into their places, and zeros into all others.

    The elements are cut into groups of 256. A value's place is a byte: its place in the group.

    Parameters
    ----------
    ends_i32 : (n_groups,) int32
        values of all groups up to the end of each; they do not fall
    begin : int
        values before the first of these groups
    skipped : int
        elements of the first group that are left out
    at_u8 : (ends[-1] - begin,) uint8
        place of each value
    values_f32 : (ends[-1] - begin,) float32
        the values
    out_f32 : (n,) float32
        written: the elements from `skipped` on; what would lie after its end is left out
    """
    for i in range(out_f32.size):
        out_f32[i] = np.float32(0.0)
    at = 0
    for group in range(ends_i32.size):
        stop = np.int64(ends_i32[group]) - begin
        first = 256 * group - skipped
        while at < stop:
            place = first + np.int64(at_u8[at])
            if 0 <= place < out_f32.size:
                out_f32[place] = values_f32[at]
            at += 1
