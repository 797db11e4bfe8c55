"""The self-test of compiler, linker and call: one function whose result is known.

Machine code finds its arguments where Numba's convention puts them. That is no public interface of Numba,
and a version that changed it would read numbers as addresses. `probe` takes every kind of argument that
kernels take; its image is made and called as theirs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["SIGNATURE", "gives_known_result", "probe"]

SIGNATURE = "i8, u8, f4, f8, b1, u1[::1], u2[::1], u4[::1], i4[::1], i8[::1], f4[:,::1], f8[:,:,::1], f8[::1]"


def probe(  # type: ignore[no-untyped-def]
    signed, unsigned, single, double, flag, bytes_, halves, words, ints, longs, matrix, cube, out
):
    """Write what was found of every argument to `out` (16 values)."""
    out[0] = signed
    out[1] = unsigned >> np.uint64(1)
    out[2] = single
    out[3] = math.exp(double)
    out[4] = 1.0 if flag else 0.0
    out[5] = bytes_[bytes_.size - 1]
    out[6] = halves[halves.size - 1]
    out[7] = words[words.size - 1]
    out[8] = ints[ints.size - 1]
    out[9] = longs[longs.size - 1]
    rows, columns = matrix.shape
    out[10] = matrix[rows - 1, 1]
    out[11] = 10 * rows + columns
    layers, rows, columns = cube.shape
    out[12] = cube[layers - 1, 1, columns - 1]
    out[13] = 100 * layers + 10 * rows + columns
    total = 0.0
    for row in range(matrix.shape[0]):
        for value in matrix[row]:
            total += value
    out[14] = total


def gives_known_result(function: Callable[..., None]) -> bool:
    """Call a compiled `probe`, and the Python one, with the same arguments; compare."""
    results = []
    calls: tuple[Callable[..., None], ...] = (function, probe)
    for call in calls:
        out = np.full(16, -1.0)
        call(*_arguments(), out)
        results.append(out)
    return bool((results[0] == results[1]).all())


def _arguments() -> list[Any]:
    return [
        -(2**40) - 1,
        np.uint64(2**41 + 4),
        np.float32(0.1),
        0.0,
        True,
        np.array([1, 250], np.uint8),
        np.array([1, 2, 65000], np.uint16),
        np.array([2**32 - 5], np.uint32),
        np.array([7, -8], np.int32),
        np.array([0, -(2**35)], np.int64),
        np.arange(12, dtype=np.float32).reshape(4, 3),
        np.arange(30, dtype=np.float64).reshape(5, 2, 3),
    ]
