"""CRC-32 of a tensor that is read or written in pieces, by several workers, in any order.

Intel's ISA-L computes it, on Arm too: 1 % of a merge of Q4_K_M files, where zlib takes 7 %. The values are
those of zlib. SHA-256 of whole files is in `edgemerge.output.parts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from isal.isal_zlib import crc32, crc32_combine

from edgemerge.types import UInt8

__all__ = ["RowChecksum", "TensorResult", "join_checksums"]


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

    @property
    def n_rows(self) -> int:
        """Rows that were added."""
        return sum(run.stop - run.start for run in self.runs)

    def add(self, start: int, n_rows: int, raw_u8: UInt8) -> None:
        """Add rows from `start` on. This is cheapest where they continue the rows before."""
        if not self.runs or self.runs[-1].stop != start:
            self.runs.append(_Run(start, start, 0, 0))
        run = self.runs[-1]
        run.crc32 = crc32(raw_u8.data, run.crc32)
        run.n_bytes += raw_u8.nbytes
        run.stop += n_rows


def join_checksums(parts: Sequence[RowChecksum]) -> int:
    """Return the CRC-32 of all rows in order; 0 of none."""
    runs = sorted((run for part in parts for run in part.runs), key=lambda run: run.start)
    total = 0
    for run in runs:
        total = crc32_combine(total, run.crc32, run.n_bytes)
    return total
