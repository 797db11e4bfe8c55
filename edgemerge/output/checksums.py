"""CRC-32 of a tensor that is read or written in pieces, by several workers, in any order."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from edgemerge.native import KernelFile
from edgemerge.types import UInt8

__all__ = ["RowChecksum", "TensorResult", "combine_checksums", "crc32", "join_checksums"]

kernels = KernelFile("crc")

# Polynomials over GF(2) as zlib keeps them: reflected, x^0 in the highest of 32 bits.
ONE = 1 << 31
CRC_POLYNOMIAL = 0xEDB88320
FOLDED = 256  # FOLDED of kernels/crc.py: bytes
LEAST_FOLDED = 1 << 15  # bytes; below, a call of a kernel costs more than it saves


@dataclass(frozen=True, slots=True)
class TensorResult:
    """CRC-32 of what was read of each input, in the order of the output, and of what was written.

    0 for an input whose heads a soft alignment sums.
    """

    inputs: tuple[int, ...]
    output: int


@dataclass(slots=True)
class _Run:
    """Consecutive rows."""

    start: int
    stop: int
    crc32: int
    n_bytes: int


@dataclass(slots=True)
class RowChecksum:
    """CRC-32 of the rows that one worker read or wrote, in pieces."""

    runs: list[_Run] = field(default_factory=list)

    def add(self, start: int, n_rows: int, raw_u8: UInt8) -> None:
        """Add rows from `start` on. This is cheapest where they continue the rows before."""
        if not self.runs or self.runs[-1].stop != start:
            self.runs.append(_Run(start, start, 0, 0))
        run = self.runs[-1]
        run.crc32 = crc32(raw_u8, run.crc32)
        run.n_bytes += raw_u8.nbytes
        run.stop += n_rows


def crc32(raw_u8: UInt8, value: int = 0) -> int:
    """Return the CRC-32 of bytes behind others, whose CRC-32 is the value; faster than zlib where long.

    Parameters
    ----------
    raw_u8 : (n,) uint8
        C-contiguous, writable.
    value : int
        CRC-32 of what comes before.
    """
    if raw_u8.size < LEAST_FOLDED or not _Folding.is_possible:
        return zlib.crc32(raw_u8.data, value)
    state, is_done = raw_u8[:FOLDED].copy(), np.empty(1, np.uint8)
    state[:4].view("<u4")[0] ^= value ^ 0xFFFFFFFF
    kernels.fold_crc32(raw_u8[FOLDED:], *_Folding.factors(), state, is_done)
    if not is_done[0]:
        _Folding.is_possible = False
        return zlib.crc32(raw_u8.data, value)
    # zlib starts from the complement of what it is given: here from nothing, as the state has it all.
    folded = zlib.crc32(state.data, 0xFFFFFFFF)
    return zlib.crc32(raw_u8[raw_u8.size // FOLDED * FOLDED :].data, folded)


class _Folding:
    """What `crc32` knows of this machine; the kernel itself finds out whether the processor can."""

    is_possible = os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"

    @staticmethod
    @lru_cache(maxsize=1)
    def factors() -> tuple[int, int]:
        """Return what the halves of 128 bits are multiplied by to move on by FOLDED bytes."""
        return _power_of_x(8 * FOLDED + 32) << 1, _power_of_x(8 * FOLDED - 32) << 1


def join_checksums(parts: Sequence[RowChecksum]) -> int:
    """Return the CRC-32 of all rows in order; 0 of none."""
    runs = sorted((run for part in parts for run in part.runs), key=lambda run: run.start)
    total = 0
    for run in runs:
        total = combine_checksums(total, run.crc32, run.n_bytes)
    return total


def combine_checksums(first: int, second: int, n_bytes: int) -> int:
    """Return the CRC-32 of one piece and a second one, of `n_bytes`, behind it.

    CRC(A then B) = CRC(A) * x^(8 * bytes of B) + CRC(B), as in zlib's `crc32_combine`.
    """
    return _multiply(_power_of_x(8 * n_bytes), first) ^ second


@lru_cache(maxsize=64)  # blocks of one tensor have one size
def _power_of_x(exponent: int) -> int:
    """x^exponent, by squaring."""
    power, square = ONE, ONE >> 1
    while exponent:
        if exponent & 1:
            power = _multiply(square, power)
        square = _multiply(square, square)
        exponent >>= 1
    return power


def _multiply(a: int, b: int) -> int:
    """Multiply modulo the CRC's polynomial."""
    product = 0
    while a:
        if a & ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (CRC_POLYNOMIAL if b & 1 else 0)
    return product
