"""DARE's random drop, counter based (Yu et al. 2024, section 3.2, "Drop")."""

import numpy as np
from numba import njit

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)


@njit(cache=True, nogil=True)
def drop_random(key, first, threshold, delta_f32):
    """Keep each element with one probability, by a hash of its index, and zero the others.

    Element i is kept when the top 24 bits of `splitmix64(key + (first + i) * gamma)` (Steele et al.
    2014) are below the threshold: what is kept depends on key and index alone, never on blocks or threads.

    Parameters
    ----------
    key : uint64
        hash of seed, tensor and task vector
    first : uint64
        flat index of element 0 in its tensor
    threshold : uint64
        probability to keep, times 2^24
    delta_f32 : (n,) float32
        task vector, overwritten
    """
    bits = delta_f32.view(np.int32)
    for i in range(bits.size):
        z = np.uint64(key) + (np.uint64(first) + np.uint64(i)) * GAMMA
        z = (z ^ (z >> np.uint64(30))) * MIX_1
        z = (z ^ (z >> np.uint64(27))) * MIX_2
        z = z ^ (z >> np.uint64(31))
        kept = (z >> np.uint64(40)) < np.uint64(threshold)
        # A mask: of a choice LLVM makes a branch, which half the time no processor foresees.
        bits[i] = bits[i] & -np.int32(kept)
