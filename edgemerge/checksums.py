"""CRC-32 of a tensor that is read or written in pieces, by several workers, in any order."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from edgemerge.types import UInt8

__all__ = ["RowChecksum", "TensorResult", "combine_checksums", "join_checksums"]

# Polynomials over GF(2) as zlib keeps them: reflected, x^0 in the highest of 32 bits.
ONE = 1 << 31
CRC_POLYNOMIAL = 0xEDB88320


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
    """What one worker saw of a tensor."""

    runs: list[_Run] = field(default_factory=list)

    def add(self, start: int, n_rows: int, raw_u8: UInt8) -> None:
        """Take rows from `start` on into account; cheapest where they continue those before."""
        if not self.runs or self.runs[-1].stop != start:
            self.runs.append(_Run(start, start, 0, 0))
        run = self.runs[-1]
        run.crc32 = zlib.crc32(raw_u8.data, run.crc32)
        run.n_bytes += raw_u8.nbytes
        run.stop += n_rows


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
